"""A runner without a GPU: Triton's interpreter, on shapes that are tiny."""

from __future__ import annotations

import os

import pytest

# Triton reads it when it is imported; the build's own processes set it back.
if "MDM_TEST_GPU" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("torch", reason="torch (extra export) runs the reference")
pytest.importorskip("triton", reason="triton interprets the kernels")

from mdm.tools.gpu_check.runners import SourceRunner


@pytest.fixture
def interpreter() -> SourceRunner:
    if "MDM_TEST_GPU" in os.environ:
        pytest.skip("MDM_TEST_GPU has Triton compile; these tests want its interpreter")
    return SourceRunner("cpu", multiprocessors=132, capability=(9, 0))


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of 16 tokens and more, so that short sequences have several."""
    monkeypatch.setattr("mdm.plugins.gpu.variants.UNIT", 16)
    monkeypatch.setattr("mdm.plugins.gpu.variants.SHORTEST", 16)
