"""What of this machine a process may use: cores and memory, within the limits of its control groups; and what is here.

On the ground floor, and without a package of others, since `mdm doctor` looks when everything else is broken.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")  # where proc and sys are


class Cores(NamedTuple):
    """Physical cores; of `total` this process may use `usable`, and of their time is granted that of `granted`."""

    total: int
    usable: int
    granted: float

    @property
    def threads(self) -> int:
        """As many as can work at once."""
        return max(1, int(min(self.usable, self.granted)))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", read("proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.machine()


def cores() -> Cores:
    logical = range(os.cpu_count() or 1)
    return Cores(physical(logical), physical(allowed()), granted_cores())


def allowed() -> Iterable[int]:
    """The logical cores that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def physical(logical: Iterable[int]) -> int:
    """How many cores these are, of which a thread of its own may make two."""
    return len({read(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in logical})


def groups(controller: str) -> Iterator[str]:
    """The control groups this process is in, up to the root; version 1 has a tree for each controller."""
    for line in read("proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            for folder in (Path(path), *Path(path).parents):
                yield f"sys/fs/cgroup/{controller if controllers else ''}{folder}"


def granted_cores() -> float:
    granted = math.inf
    for group in groups("cpu"):
        said = read(f"{group}/cpu.max") or f"{read(f'{group}/cpu.cfs_quota_us')} {read(f'{group}/cpu.cfs_period_us')}"
        if found := re.fullmatch(r"(\d+) (\d+)", said):
            granted = min(granted, int(found[1]) / int(found[2]))
    return granted


def free_memory() -> float:
    """Bytes that can be had without swapping; infinite where the system does not tell."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", read("proc/meminfo"))
    free = int(found[1]) * 1024 if found else math.inf
    for group in groups("memory"):
        limit = read(f"{group}/memory.max") or read(f"{group}/memory.limit_in_bytes")
        used = read(f"{group}/memory.current") or read(f"{group}/memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit():
            # Files that were read count as used, and give way when memory is wanted.
            files = re.findall(r"^(?:total_)?inactive_file (\d+)", read(f"{group}/memory.stat"), re.MULTILINE)
            free = min(free, int(limit) - int(used) + max(map(int, files), default=0))
    return free


def read(path: str) -> str:
    try:
        return (ROOT / path).read_text().strip()
    except OSError:
        return ""
