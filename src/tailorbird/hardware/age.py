"""How long this process has been there."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()


def process_age() -> float:
    """Seconds since this process was started; where the system doesn't tell, since this module was imported.

    On Linux field 22 of ``/proc/self/stat``, in hundredths of a second
    (https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html).
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _IMPORTED
