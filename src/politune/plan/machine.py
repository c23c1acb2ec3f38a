"""What this machine has: cores, memory, disk and GPUs, found without torch."""

import ctypes
import math
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
DRIVER_TIMEOUT_SECONDS = 20

# Runs in a process of its own: the driver reads CUDA_VISIBLE_DEVICES once per process, at cuInit, and a plan must not
# be what fixes it.
_ASK_THE_DRIVER = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
count = ctypes.c_int()
if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
    raise SystemExit
for ordinal in range(count.value):
    device, total, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), ordinal)
    cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    print(total.value, major.value, minor.value, name.value.decode(errors="replace"), sep="\\t")
"""


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as the driver describes it."""

    name: str
    total_bytes: int
    capability: tuple[int, int]

    @property
    def computes_bfloat16(self) -> bool:
        """bfloat16 arithmetic came with compute capability 8.0 (Ampere)."""
        return self.capability >= (8, 0)


@dataclass(frozen=True)
class Machine:
    """What a run may use; None where it cannot be found out."""

    cores: int
    memory_available_bytes: int | None
    disk_free_bytes: int | None
    gpus: tuple[Gpu, ...] = ()
    processor: str = "CPU"

    @property
    def device(self) -> str:
        """The device that one process trains on, in words."""
        return (
            self.gpus[0].name if self.gpus else f"{self.processor}, {self.cores} core{'s' if self.cores != 1 else ''}"
        )

    @property
    def device_bytes(self) -> int | None:
        """Memory for training: that of the first GPU, else what the host has left."""
        return self.gpus[0].total_bytes if self.gpus else self.memory_available_bytes


def probe(output_dir: Path | str) -> Machine:
    """Looks at this machine; `output_dir` (which need not exist yet) tells which disk counts."""
    return Machine(
        cores=count_cores(),
        memory_available_bytes=find_available_memory(),
        disk_free_bytes=find_free_disk(Path(output_dir)),
        gpus=find_gpus(),
        processor=find_processor(),
    )


def find_processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as the system tells it."""
    names = (line.partition(":")[2].strip() for line in _read(cpuinfo).splitlines() if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine() or "CPU"


def count_cores(cgroup: Path = CGROUP_ROOT) -> int:
    """Cores that this process may run on: its affinity, capped by the cgroup's quota (cpu.max, rounded up)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [_quota_cores(directory / "cpu.max") for directory in _own_cgroups(cgroup)]
    return max(1, min([affinity, *(quota for quota in quotas if quota)]))


def find_available_memory(cgroup: Path = CGROUP_ROOT, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes that a new process can have: MemAvailable, capped by what each enclosing cgroup has left."""
    limits = [_cgroup_left(directory) for directory in _own_cgroups(cgroup)]
    known = [left for left in (_meminfo_available(meminfo), *limits) if left is not None]
    return min(known) if known else None


def find_free_disk(directory: Path) -> int | None:
    """Bytes free where `directory` is or will be."""
    try:
        existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
        return shutil.disk_usage(existing).free
    except (OSError, StopIteration):
        return None


def find_gpus() -> tuple[Gpu, ...]:
    """The CUDA devices that CUDA_VISIBLE_DEVICES leaves, in the driver's order; none where there is no driver."""
    try:
        ctypes.CDLL("libcuda.so.1")  # loading initialises nothing; without it no process needs to be started
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _ASK_THE_DRIVER],
            capture_output=True,
            text=True,
            timeout=DRIVER_TIMEOUT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(answer.stdout)


def parse_gpus(answer: str) -> tuple[Gpu, ...]:
    """Lines of `total bytes, major, minor, name`, parted by tabs, as devices."""
    rows = [line.split("\t", 3) for line in answer.splitlines() if line.count("\t") >= 3]
    return tuple(Gpu(name, int(total), (int(major), int(minor))) for total, major, minor, name in rows)


def _meminfo_available(meminfo: Path) -> int | None:
    for line in _read(meminfo).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _own_cgroups(root: Path) -> list[Path]:
    """The directories of this process's cgroup (version 2) and its parents; a container sees its own as the root."""
    own = next((line[3:] for line in _read(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::")), "/")
    directory = (root / own.lstrip("/")).resolve()
    inside = directory if directory.is_dir() and root in directory.parents else root
    return [inside, *(parent for parent in inside.parents if parent == root or root in parent.parents)]


def _cgroup_left(directory: Path) -> int | None:
    """memory.max - memory.current + the page cache that the kernel would give up; also version 1's names."""
    limit = _number(directory / "memory.max")
    used = _number(directory / "memory.current")
    statistics = directory / "memory.stat"
    if limit is None:
        limit = _number(directory / "memory" / "memory.limit_in_bytes")
        used = _number(directory / "memory" / "memory.usage_in_bytes")
        statistics = directory / "memory" / "memory.stat"
    if limit is None or used is None:
        return None
    cache = [line.split()[1] for line in _read(statistics).splitlines() if line.startswith("inactive_file ")]
    return max(0, limit - used + (int(cache[0]) if cache else 0))


def _quota_cores(cpu_max: Path) -> int | None:
    quota, _, period = _read(cpu_max).strip().partition(" ")
    return math.ceil(int(quota) / int(period)) if quota.isdigit() and period.isdigit() else None


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None  # `max` is no limit


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
