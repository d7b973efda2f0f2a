"""Shared by all tests: one thread per process, the fixture `figure`, which records what a test measured, and a tiny
model with random weights, on which everything takes milliseconds.

    def test_oracle(figure):
        figure("dim oracle eps", worst, 1e-5)   # fails unless worst <= 1e-5

All figures are printed as one table at the end of the run, passed or failed, without -s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# Before torch or numpy is imported. The tests' tensors are tiny, where a second thread only costs, and
# sums then come out in the same order on every machine. Processes started by tests inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # many tests import it before anything of ours

import pytest

if TYPE_CHECKING:
    from mdm.reference import Tokenizer
    from mdm.reference.multimodal import MDM


class Measured(NamedTuple):
    """One line of the table."""

    name: str
    value: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.value <= self.limit  # false for NaN


MEASURED: list[Measured] = []  # of the whole run; with several processes, in the one that reports


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, float, float], None]:
    """Record a measured figure and hold it to its limit: figure(name, value, limit)."""

    def record(name: str, value: float, limit: float) -> None:
        measured = Measured(name, float(value), float(limit))
        request.node.user_properties.append(("figure", [*measured]))  # travels with the test's report
        assert measured.holds, f"{name}: measured {measured.value:.3g}, limit {measured.limit:.3g}"

    return record


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        MEASURED.extend(Measured(*value) for name, value in report.user_properties if name == "figure")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    rows = MEASURED
    if not rows:
        return
    width = max(len(row.name) for row in rows)
    terminalreporter.section("measured figures")
    terminalreporter.write_line(f"{'':{width}}  {'measured':>10}  {'limit':>10}")
    for row in rows:
        mark = "" if row.holds else "  over"
        terminalreporter.write_line(f"{row.name:{width}}  {row.value:10.3g}  {row.limit:10.3g}{mark}")


RIG = Path(__file__).parents[1] / ".venv/rig"


@pytest.fixture(scope="session")
def rig() -> dict[str, str]:
    """The environment of a process that is to have TensorRT's builder: tests/rig/setup makes it."""
    if not (RIG / "ready").is_file():
        pytest.skip("no TensorRT builder: tests/rig/setup .venv/rig makes one")
    return {**os.environ, "LD_LIBRARY_PATH": str(RIG / "lib"), "PYTHONPATH": str(RIG / "site")}


@pytest.fixture(scope="session")
def stand_in() -> dict[str, str]:
    """The environment of a process that is to have a stand-in for TensorRT, on a fake driver (their switches are in
    tests/runtime/tensorrt/stand_in/tensorrt/__init__.py and tests/plugins/gpu/fake_cuda.c)."""
    from .plugins.gpu.fake_cuda import fake_cuda

    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent / "runtime/tensorrt/stand_in"),
        "LD_LIBRARY_PATH": str(Path(fake_cuda()).parent),
        "FAKE_CUDA_STRICT": "1",
    }


# Sizes that mean different things are different numbers, so that a mixed-up axis is an error: 16 picture tokens, 12
# latent channels, texts of 8 or 20 tokens. Pictures are 32x32, the picture world's size.
TINY: dict[str, Any] = {
    "family": "mdm", "width": 32, "blocks": 3, "in_channels": 3, "image_size": 32, "patch": 8, "classes": 4,
    "state": 8, "head": 16, "latent": 12, "vae_width": 32, "vocabulary": 40, "text_lengths": [8, 20],
    "schedule_image": {"kind": "cosine", "shift": 0.5}, "schedule_text": {"kind": "cosine", "shift": 2.0},
    "sampler": {"solver": "ddim", "steps": 3, "guidance": 1.5, "t_start": 0.99},
}  # fmt: skip
TINY_DIM: dict[str, Any] = {
    "family": "dim", "width": 16, "blocks": 3, "in_channels": 3, "image_size": 8, "classes": 5, "state": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny() -> Callable[..., dict[str, Any]]:
    """tiny(keep=0.5, ...): the tiny MDM's config with some fields changed; tiny(family="dim") is a tiny DiM's."""

    def config(**changes: Any) -> dict[str, Any]:
        return (TINY_DIM if changes.get("family") == "dim" else TINY) | changes

    return config


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., MDM]:
    """tiny_model(keep=0.5, ...): the tiny MDM in eval mode with random weights, the same ones at every call."""

    def model(**changes: Any) -> MDM:
        import torch

        from mdm.reference import load_config
        from mdm.reference.multimodal import MDM

        with torch.random.fork_rng():
            torch.manual_seed(1)
            made = MDM(load_config(TINY | changes)).eval()
            torch.nn.init.normal_(made.latent_out.weight, std=0.2)  # 0 in a fresh model
            torch.nn.init.normal_(made.vae.latent_mean)
            torch.nn.init.uniform_(made.vae.latent_scale, 0.5, 2.0)
        return made.requires_grad_(False)

    return model


@pytest.fixture
def system_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """system_files({"proc/meminfo": "..."}): what the machine tells of itself is in these files, and in no others."""

    def make(files: dict[str, str]) -> None:
        monkeypatch.setattr("mdm.plugins.machine.ROOT", tmp_path)
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content + "\n")

    return make


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The shipped one, of the picture world."""
    from mdm.reference import SHIPPED_TOKENIZER, Tokenizer

    return Tokenizer(SHIPPED_TOKENIZER)
