"""The folder with the smallest sub-model: it shows the same error again, with ONNX Runtime and numpy alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from mdm.plugins.errors import InputError
from mdm.tools.check.limits import Multiples
from mdm.tools.check.nodes import submodel
from mdm.tools.check.nodes.bisect import bisect
from mdm.tools.check.nodes.replay import CASE, MODEL, README, WEIGHTS, compare, limits_in, replay
from mdm.tools.check.report import Divergence

from ..drawn import Drawn, draw

GRAPH, NODE = "denoise_image", "backbone.blocks.1.mixers.0.in_proj.MatMul"


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def drawn(request: pytest.FixtureRequest, tmp_path_factory: Any, tiny: Any, tiny_model: Any) -> Drawn:
    folder = tmp_path_factory.mktemp("drawn")
    return draw(folder, tiny(), tiny_model().state_dict(), precision=request.param)


def diverged(drawn: Drawn, folder: Path) -> Divergence:
    """The product reads another block's weight."""
    file = drawn.file(GRAPH)
    turn = next(node for node in file.graph.node if node.name == NODE.replace("MatMul", "Transpose"))
    turn.input[0] = turn.input[0].replace("blocks.1", "blocks.2")
    _, found = bisect(
        GRAPH, file, drawn.blueprint.model(GRAPH), drawn.values(GRAPH), drawn.inputs(GRAPH), drawn.run, Multiples(),
        folder,
    )  # fmt: skip
    assert found is not None
    assert found.node == NODE
    return found


@pytest.mark.parametrize("inline", [submodel.INLINE, 0])
def test_a_case_shows_the_same_error_again(
    drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inline: int
) -> None:
    monkeypatch.setattr(submodel, "INLINE", inline)
    folder = tmp_path / "report" / "case"
    found = diverged(drawn, folder)
    assert (found.folder, found.reproduce) == (str(folder), f"mdm check --replay {folder}")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [CASE, MODEL, README, *([] if inline else [WEIGHTS])]
    )
    assert "mdm check --replay case" in (folder / README).read_text()
    moved = folder.rename(tmp_path / "elsewhere")
    error, limits = replay(moved)
    assert error.rms == found.error
    assert limits.used(error) > 1
    assert [node.op_type for node in onnx.load(moved / MODEL).graph.node] == ["Transpose", "MatMul"]


def test_a_right_model_passes_again(drawn: Drawn, tmp_path: Path) -> None:
    diverged(drawn, tmp_path / "case")
    model = onnx.load(tmp_path / "case" / MODEL)
    right = drawn.values(GRAPH)(NODE.replace("MatMul", "weight")).numpy()
    kind = numpy_helper.to_array(model.graph.initializer[0]).dtype
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(right.astype(kind), model.graph.initializer[0].name))
    onnx.save(model, tmp_path / "case" / MODEL)
    error, limits = replay(tmp_path / "case")
    assert limits.used(error) < 0.6


def test_it_needs_neither_torch_nor_onnx(drawn: Drawn, tmp_path: Path) -> None:
    found = diverged(drawn, tmp_path / "case")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\n"
        "from pathlib import Path; from mdm.tools.check.nodes.replay import replay\n"
        f"print(replay(Path({str(tmp_path / 'case')!r}))[0].rms)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(said) == found.error


@pytest.mark.parametrize("spoil", [lambda f: (f / CASE).unlink(), lambda f: (f / MODEL).unlink()])
def test_what_is_no_case_is_refused(drawn: Drawn, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    diverged(drawn, tmp_path / "case")
    spoil(tmp_path / "case")
    with pytest.raises(InputError):
        replay(tmp_path / "case")


def test_an_unknown_backend_is_refused(drawn: Drawn, tmp_path: Path) -> None:
    diverged(drawn, tmp_path / "case")
    with pytest.raises(InputError, match="unknown backend 'ort-gpu'"):
        replay(tmp_path / "case", "ort-gpu")


def test_where_the_truth_is_not_finite_nothing_is_asked() -> None:
    truth = np.array([1.0, np.inf, np.nan, 4.0])
    assert compare(np.array([1.0, 7.0, np.nan, 4.0]), truth).rms == 0
    off = compare(np.array([1.0, 7.0, 0.0, np.nan]), truth)
    assert off.bad == 1
    assert off.at == (3,)


@pytest.mark.parametrize(
    "told",
    [
        "no json", "[]", "{}", '{"limits": {}, "looped": false}', '{"limits": {"y": 3}, "looped": false}',
        '{"limits": {"y": {"rms": 1e999, "worst": 1, "source": ""}}, "looped": false}',
        '{"limits": {"y": {"rms": 0, "worst": 1, "source": ""}}, "looped": false}',
    ],
)  # fmt: skip
def test_limits_of_a_stranger_are_refused(told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are not those that mdm check writes"):
        limits_in(told, tmp_path)
