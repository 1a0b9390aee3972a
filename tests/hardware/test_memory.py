"""What a process holds is seen rising and falling, and freed tensors leave it at once when asked."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

from tailorbird.hardware.memory import available_bytes, peak_resident_bytes, resident_bytes, total_bytes

MB = 1 << 20


def in_own_process(code: str) -> dict[str, int]:
    """What `code` prints, in a process whose heap nothing else has touched."""
    lines = "import json, sys, mmap\nfrom tailorbird.hardware.memory import *\n" + code
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_resident_and_peak_follow_an_allocation() -> None:
    seen = in_own_process(
        """
before = resident_bytes()
block = mmap.mmap(-1, 64 << 20)
block.write(b"x" * (64 << 20))
during = resident_bytes()
block.close()
after, peak = resident_bytes(), peak_resident_bytes()
was_reset = reset_peak()
print(json.dumps(dict(before=before, during=during, after=after, peak=peak,
                      was_reset=was_reset, new_peak=peak_resident_bytes())))
"""
    )
    assert seen["during"] - seen["before"] > 60 * MB
    assert seen["peak"] >= seen["during"]
    assert seen["during"] - seen["after"] > 60 * MB
    if seen["was_reset"]:
        assert seen["new_peak"] < seen["peak"] - 60 * MB


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_tensors_leave_only_when_asked() -> None:
    """Large tensors with small ones between them, freed: without the setting the heap keeps them."""
    code = """
import torch
asked = return_freed_memory() if {asked} else False
torch.ones(28 << 18)
large, small = [], []
for _ in range(16):
    large.append(torch.ones(20 << 18))
    small.append(torch.ones(1 << 14))
during = resident_bytes()
del large
print(json.dumps(dict(asked=asked, freed=during - resident_bytes())))
"""
    asked, unasked = in_own_process(code.format(asked=True)), in_own_process(code.format(asked=False))
    assert asked["asked"]
    assert asked["freed"] > 60 * MB
    assert unasked["freed"] < 32 * MB


def test_amounts_are_ordered() -> None:
    assert 0 < resident_bytes() <= peak_resident_bytes() < total_bytes()
    assert 0 < available_bytes() <= total_bytes()
