"""Cores and memory, on made-up machines."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest

from mdm.plugins.machine import cores, free_memory

Files = Callable[[dict[str, str]], None]


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({"proc/self/cgroup": "0::/"}, math.inf),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000"}, math.inf),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/x\n0::/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
    ],
    ids=["none", "version 2", "unlimited", "version 1"],
)
def test_control_groups_limit_the_cores(
    system_files: Files, files: dict[str, str], granted: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    system_files(files)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert cores() == (4, 4, granted)
    assert cores().threads == (4 if granted == math.inf else 1)


def test_two_threads_of_a_core_are_one_core(system_files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    system_files({siblings.format(cpu): f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert cores() == (4, 4, math.inf)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 1})
    assert cores() == (4, 2, math.inf)
    assert cores().threads == 2


def test_control_groups_limit_the_memory(system_files: Files) -> None:
    system_files({})
    assert free_memory() == math.inf
    system_files({"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8000 kB"})
    assert free_memory() == 8000 * 1024
    stat = "inactive_file 7\ntotal_inactive_file 100"
    group = {"memory.limit_in_bytes": "5000", "memory.usage_in_bytes": "3000", "memory.stat": stat}
    system_files({"proc/self/cgroup": "4:memory:/x"} | {f"sys/fs/cgroup/memory/x/{k}": v for k, v in group.items()})
    assert free_memory() == 2100
    system_files({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "900", "sys/fs/cgroup/memory.current": "400"})
    assert free_memory() == 500
