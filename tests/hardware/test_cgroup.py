"""Container limits are found in both layouts, the tightest group wins, and absence limits nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tailorbird.hardware.cgroup import cpu_quota, memory_headroom, memory_limit


def write(root: Path, files: dict[str, object]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_version_2_takes_the_tightest_of_all_groups_above(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner",
            "sys/fs/cgroup/outer/cpu.max": "150000 100000",
            "sys/fs/cgroup/outer/inner/cpu.max": "max 100000",
            "sys/fs/cgroup/outer/memory.max": 1000,
            "sys/fs/cgroup/outer/memory.current": 900,
            "sys/fs/cgroup/outer/memory.stat": "anon 600\ninactive_file 250",
            "sys/fs/cgroup/outer/inner/memory.max": 2000,
            "sys/fs/cgroup/outer/inner/memory.current": 10,
        },
    )
    assert cpu_quota(root) == 1.5
    assert memory_limit(root) == 1000
    assert memory_headroom(root) == 1000 - 900 + 250


def test_version_1_finds_the_mount_itself_when_the_named_group_is_outside_the_container(
    tmp_path: Path,
) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": 300000,
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": 100000,
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 5000,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 6000,
        },
    )
    assert cpu_quota(root) == 3
    assert memory_limit(root) == 5000
    assert memory_headroom(root) == 0


@pytest.mark.parametrize(
    "files",
    [
        {},
        {
            "proc/self/cgroup": "0::/x",
            "sys/fs/cgroup/x/memory.max": "max",
            "sys/fs/cgroup/x/cpu.max": "max 1",
        },
        {
            "proc/self/cgroup": "4:memory:/\n1:cpu:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
        },
    ],
)
def test_no_limit_is_none(tmp_path: Path, files: dict[str, object]) -> None:
    root = write(tmp_path, files)
    assert (cpu_quota(root), memory_limit(root), memory_headroom(root)) == (None, None, None)
