"""What this machine can do: cores, memory, disk, and the rates that decide how long work takes.

Rates are measured once, with all usable cores, and kept in the cache under the machine's identity; sizes
that change by the minute (memory available, disk free) are read anew each time. Measuring takes a few seconds
and up to 512 MiB of memory for a moment. A busy machine measures slow: refresh when it is quiet.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tailorbird.hardware.cache import cache_directory, forget_kernel_times, write_entry
from tailorbird.hardware.cgroup import cpu_quota
from tailorbird.hardware.memory import available_bytes, total_bytes
from tailorbird.progress import Progress, Silent

SCHEMA = 1

#: Buffer that is read and copied: more than the last-level caches of today's machines give to one process.
MEMORY_BYTES = 512 << 20
DISK_BYTES = 128 << 20
DISK_CHUNK = 16 << 20
#: A slow disk is given up on after this long, and judged by what it did until then.
DISK_SECONDS = 1.2
MATMUL_SECONDS = 0.2

#: The extensions that matter to arithmetic, in Linux's names and in the order in which they are listed.
SIMD = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
    *("neon", "asimd", "asimdhp", "asimddp", "fphp", "i8mm", "bf16", "sve", "sve2", "sme", "vsx"),
)


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes
    ----------
    name : str
    memory_bytes : int
    bandwidth : float
        Bytes per second read plus written by a copy inside its memory.
    matmul : dict
        ``{"bf16": FLOP/s}``.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    matmul: dict[str, float]


@dataclass(frozen=True)
class Probe:
    """What a machine can do. Bytes, bytes per second, FLOP per second.

    Attributes
    ----------
    cores : int
        Cores that this process may use (affinity and container quota).
    simd : list of str
        Vector and matrix extensions, in Linux's names.
    memory_bytes, memory_available_bytes : int
        RAM in all and free to take now, container limits included.
    read_bandwidth : float
        Summing a large tensor.
    copy_bandwidth : float
        Copying a large tensor, bytes read plus bytes written.
    disk_free_bytes : int
    disk_bandwidth : float or None
        Sequential reading past the page cache; None where the directory couldn't be written.
    matmul : dict
        ``fp32``, ``bf16``, ``int8`` -> operations per second of a square product; None where PyTorch
        has no such product on this machine.
    devices : list of Device
    """

    cores: int
    simd: list[str]
    memory_bytes: int
    memory_available_bytes: int
    read_bandwidth: float
    copy_bandwidth: float
    disk_free_bytes: int
    disk_bandwidth: float | None
    matmul: dict[str, float | None]
    devices: list[Device]


def probe(
    refresh: bool = False, directory: Path | str | None = None, progress: Progress | None = None
) -> Probe:
    """Measure this machine, or read what was measured before.

    Parameters
    ----------
    refresh : bool
        Measure again although the cache holds this machine; times of kernels are forgotten, too.
    directory : Path or str, optional
        Where the disk is measured (the nearest existing directory above it); the current one by default.
    progress : Progress, optional
        Told of each measurement.

    Returns
    -------
    Probe
    """
    progress = progress or Silent()
    place = _existing(Path(directory) if directory is not None else Path.cwd())
    disk = str(os.stat(place).st_dev)
    identity = machine_identity()
    path = cache_directory() / "probe.json"
    if refresh:
        forget_kernel_times()
    entry = None if refresh else _read_cache(path, identity)
    if entry is None or disk not in entry["disks"]:
        progress.stage("probe", 4 if entry is None else 1)
        if entry is None:
            entry = {"schema": SCHEMA, "identity": identity, "rates": _rates(progress), "disks": {}}
        measured = _disk_bandwidth(place)
        if measured is not None:
            entry["disks"][disk] = measured
        progress.advance(note="disk")
        write_entry(path, entry)
    rates = entry["rates"]
    return Probe(
        cores=identity["cores"],
        simd=simd_features(),
        memory_bytes=total_bytes(),
        memory_available_bytes=available_bytes(),
        read_bandwidth=rates["read_bandwidth"],
        copy_bandwidth=rates["copy_bandwidth"],
        disk_free_bytes=shutil.disk_usage(place).free,
        disk_bandwidth=entry["disks"].get(disk),
        matmul=rates["matmul"],
        devices=[Device(**device) for device in rates["devices"]],
    )


def usable_cores() -> int:
    """Cores that this process may use: its affinity, cut to whole cores by the container's quota."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def processor_name() -> str:
    """The processor as it calls itself, with its generation, such as ``AMD EPYC (family 25, model 17)``.

    Hosts of virtual machines often leave the rest of the name out, and generations differ twofold in speed.
    """
    fields = _cpuinfo()
    name = fields.get("model name") or fields.get("cpu") or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        return f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return name


def simd_features() -> list[str]:
    """Vector and matrix extensions of the processor that matter to arithmetic, in a fixed order."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    found = [name for name in SIMD if name in flags]
    if found:
        return found
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return [] if capability in ("default", "no avx") else [capability]


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo, names in small letters; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip().lower(), value.strip())
    return fields


def machine_identity() -> dict[str, Any]:
    """What must be equal for measured rates to hold."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "memory_bytes": total_bytes(),
        "torch": torch.__version__,
        "devices": [torch.cuda.get_device_name(i) for i in range(count)],
    }


def _existing(directory: Path) -> Path:
    directory = directory.expanduser().absolute()
    while not directory.is_dir():
        directory = directory.parent
    return directory


# --- the cache ---------------------------------------------------------------------------------------------


def _read_cache(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The cached entry of this machine, or None where there is none or it can't be understood."""
    try:
        entry = json.loads(path.read_text())
        rates = entry["rates"]
        sound = (
            entry["schema"] == SCHEMA
            and entry["identity"] == identity
            and all(_is_rate(rates[name]) for name in ("read_bandwidth", "copy_bandwidth"))
            and set(rates["matmul"]) == {"fp32", "bf16", "int8"}
            and all(value is None or _is_rate(value) for value in rates["matmul"].values())
            and all(_is_rate(value) for value in entry["disks"].values())
        )
        for device in rates["devices"]:
            Device(**device)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return entry if sound else None


def _is_rate(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


# --- the measurements --------------------------------------------------------------------------------------


def _rates(progress: Progress) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        read, copy = _memory_bandwidth()
        progress.advance(note="memory")
        matmul = {
            "fp32": _matmul(torch.float32),
            "bf16": _matmul(torch.bfloat16),
            "int8": _matmul(torch.int8),
        }
        progress.advance(note="matmul")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [asdict(_device(i)) for i in range(count)]
        if count:
            torch.cuda.empty_cache()
        progress.advance(note="devices")
    finally:
        torch.set_num_threads(threads)
    return {"read_bandwidth": read, "copy_bandwidth": copy, "matmul": matmul, "devices": devices}


def _seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of `work` after one call that doesn't count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _memory_bandwidth() -> tuple[float, float]:
    """Bytes per second of reading, and of copying (read plus written)."""
    size = min(MEMORY_BYTES, available_bytes() // 8) // 8 * 8
    buffer = torch.ones(max(size, 1 << 20) // 4)
    first, second = buffer.chunk(2)
    read = buffer.nbytes / _seconds(lambda: buffer.sum())
    copy = 2 * first.nbytes / _seconds(lambda: second.copy_(first))
    return read, copy


def _matmul(dtype: torch.dtype) -> float | None:
    """Operations per second of a square product, as large as shows the rate within the time allowed."""

    def product(n: int) -> Callable[[], Any]:
        if dtype == torch.int8:
            a, b = (torch.randint(-127, 128, (n, n), dtype=dtype) for _ in range(2))
            return lambda: torch._int_mm(a, b)
        a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
        return lambda: a @ b

    n = 512
    try:
        while True:
            work = product(n)
            work()
            start = time.perf_counter()
            work()
            once = time.perf_counter() - start
            if once > MATMUL_SECONDS / 20 or n >= 4096:
                break
            n *= 2
        return 2 * n**3 / _seconds(work, repeats=max(1, min(9, int(MATMUL_SECONDS / once))))
    except (RuntimeError, AttributeError):
        return None


def _disk_bandwidth(directory: Path) -> float | None:
    """Bytes per second of reading a file that the page cache doesn't hold."""
    chunk = os.urandom(DISK_CHUNK)
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".tailorbird-probe-", buffering=0) as file:
            descriptor = file.fileno()
            start, written = time.perf_counter(), 0
            while written < DISK_BYTES and time.perf_counter() - start < DISK_SECONDS:
                written += os.write(descriptor, chunk)
                os.fsync(descriptor)
            _forget_pages(descriptor)
            start, done = time.perf_counter(), 0
            while done < written and time.perf_counter() - start < DISK_SECONDS:
                got = len(os.pread(descriptor, DISK_CHUNK, done))
                if got == 0:
                    break
                done += got
            elapsed = time.perf_counter() - start
    except OSError:
        return None
    return done / elapsed if done else None


def _forget_pages(descriptor: int) -> None:
    """Make the next reads of a synced file come from the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    elif platform.system() == "Darwin":
        # fcntl.F_NOCACHE, which other systems' modules don't name.
        fcntl.fcntl(descriptor, 48, 1)


def _device(index: int) -> Device:
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    size = max(1 << 20, min(1 << 30, free // 8))
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    n = 4096
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))

    def copy() -> None:
        target.copy_(source)
        torch.cuda.synchronize(device)

    def product() -> None:
        torch.mm(a, b)
        torch.cuda.synchronize(device)

    bandwidth = 2 * size / _seconds(copy)
    return Device(properties.name, properties.total_memory, bandwidth, {"bf16": 2 * n**3 / _seconds(product)})
