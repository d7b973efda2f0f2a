"""GPUs as a driver tells them. The driver is compiled for the test."""

from __future__ import annotations

from collections.abc import Callable

from mdm.tools.gpus import gpus


def test_gpus_are_told_by_the_driver(
    driver: Callable[[int], None], system_files: Callable[[dict[str, str]], None]
) -> None:
    driver(0)
    kernel = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  595.71.05  Release Build  (x)"
    system_files({"proc/driver/nvidia/version": kernel})
    first, second = gpus()
    assert first == ("First, compute capability 9.0, 150 GB; driver 595.71.05 for CUDA 13.2", 150_000_000_000)
    assert second[0].startswith("Second, compute capability 9.1")
