"""What is measured, and with what."""

from __future__ import annotations

import datetime
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mdm.plugins.gpu.counts import SPECIALS_A_CLOCK, Chip, float32_lanes
from mdm.plugins.gpu.driver import Device, Driver
from mdm.plugins.machine import versions
from mdm.tools.gpu_check.measure import Ceilings

CLOCK_RATE = 13  # device attribute: the highest clock, in kHz
ASKED = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "ecc.mode.current")


@dataclass(frozen=True)
class About:
    name: str
    multiprocessors: int
    capability: tuple[int, int]
    clock: float  # the highest, in Hz
    date: str
    command: str
    software: dict[str, str]
    told: dict[str, str]  # by nvidia-smi, if it is there


def look(runner: str, words: Sequence[str]) -> About:
    driver = Driver()
    device = Device(driver)
    clock = 1000.0 * driver.number("cuDeviceGetAttribute", CLOCK_RATE, driver.number("cuDeviceGet", 0))
    software = {"kernels": runner, "CUDA of the driver": driver.version(), "Python": sys.version.split()[0]}
    software |= versions(("torch", "triton", "numpy", "mamba-ssm"))
    return About(
        device.name, device.multiprocessors, device.capability, clock,
        datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        shlex.join(("python", "tools/gpu_check", *words)), software, _ask_nvidia_smi(),
    )  # fmt: skip


def _ask_nvidia_smi() -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(ASKED, values, strict=False)) if done.returncode == 0 else {}


def measured_chip(about: About, found: Ceilings) -> Chip:
    """With what was reached here; its float32 and special-function rates from its highest clock."""
    clocks = about.multiprocessors * about.clock
    return Chip(
        about.name, "measured", about.multiprocessors, about.capability, found.bandwidth, found.products,
        clocks * float32_lanes(about.capability), clocks * SPECIALS_A_CLOCK,
    )  # fmt: skip
