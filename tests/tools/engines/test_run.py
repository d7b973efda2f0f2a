"""What is found out before anything is built: a TensorRT and a GPU that are not here are planted."""

from __future__ import annotations

from typing import Any

import pytest

from mdm.plugins.errors import EngineError, EnvironmentLackError, InputError
from mdm.runtime.tensorrt.facts import Options
from mdm.tools.engines import run
from mdm.tools.engines.run import failure, place_here


class Gpu:
    name, capability, closed = "NVIDIA T4", (7, 5), 0

    def close(self) -> None:
        Gpu.closed += 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine("11.3.0", (9, 0)): of this TensorRT, and a GPU of this capability or none."""

    def make(version: str, capability: tuple[int, int] | None) -> None:
        def driver() -> None:
            if capability is None:
                raise EnvironmentLackError("no NVIDIA driver")

        monkeypatch.setattr(Gpu, "capability", capability)
        monkeypatch.setattr(Gpu, "closed", 0)
        monkeypatch.setattr(run, "ask", lambda request, told: {"tensorrt": version})
        monkeypatch.setattr(run, "Driver", driver)
        monkeypatch.setattr(run, "Device", lambda found: Gpu())

    return make


def test_the_place(machine: Any) -> None:
    machine("11.4.0", (9, 0))
    place = place_here(Options(hardware="ampere-plus", refit=True))
    assert (place["tensorrt"], place["gpu"]) == ("11.4.0", "NVIDIA T4, compute capability 9.0")
    assert Gpu.closed == 1
    machine("11.4.0", None)
    assert place_here(Options(hardware="ampere-plus"))["gpu"] == "no GPU"


def test_what_cannot_be_built_here(machine: Any) -> None:
    machine("11.3.0.99", (7, 5))
    with pytest.raises(InputError, match=r"engines of TensorRT 11.3 may lose a bias"):
        place_here(Options(refit=True))
    place_here(Options(strip=True, hardware="same-capability"))
    with pytest.raises(EnvironmentLackError, match=r"capability 7.5, expected 8.0 or newer"):
        place_here(Options(hardware="ampere-plus"))


def test_how_a_child_ended() -> None:
    lines = ["[W] x", "[E] Unable to load library: libnvinfer_lean.so.11", "[W] after it"]
    assert isinstance(failure("it builds no engine", 1, lines), EnvironmentLackError)
    crash = failure(None, -6, ["[W] x", "[E] the  reason", "[W] after it"])
    assert (type(crash), str(crash)) == (EngineError, "TensorRT ended its process (-6)\n[E] the reason")
    said = failure("it is\nso", 1, [])
    assert str(said) == "TensorRT says: it is so"
    assert len(str(failure("x" * 10000, 1, ["y" * 10000]))) < 700
