"""Devices are checked before any work."""

from __future__ import annotations

import pytest

from tailorbird.cli.options import check_device
from tailorbird.errors import SettingsError


def test_the_cpu_is_always_there() -> None:
    assert check_device("cpu") == "cpu"


@pytest.mark.parametrize("device", ["", "gpu", "cuda:99", "meta", "cpu:x", "mps:7"])
def test_a_device_that_cannot_compute_here_is_named(device: str) -> None:
    with pytest.raises(SettingsError) as refused:
        check_device(device)
    assert f"--device {device}" in refused.value.given
