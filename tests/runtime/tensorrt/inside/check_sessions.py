"""tools/check/nodes/sessions.py: models that are no graph of a bundle, as engines."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, load_model_from_string

from mdm.plugins.errors import EngineError, MdmError
from mdm.runtime.backend import Backend
from mdm.runtime.bundle import open_bundle
from mdm.runtime.ort import OrtBackend
from mdm.runtime.tensorrt.backend import TensorRtBackend
from mdm.tools.check.finding import Array, difference
from mdm.tools.check.levels.operators import Case, definition, drawn, one_node, sizes_of, subjects_of
from mdm.tools.check.nodes.sessions import BODY, PLUGIN, BuiltSession, forms_on, session_on
from mdm.tools.check.nodes.submodel import weights_through
from mdm.tools.check.nodes.wiring import Wiring


@pytest.fixture(scope="module")
def backend(plain: Path) -> TensorRtBackend:
    return TensorRtBackend(open_bundle(plain))


def model(nodes: list[Any], inputs: dict[str, tuple[int, int]], *outputs: str) -> bytes:
    """`inputs`: types and how many dimensions."""
    infos = [
        helper.make_tensor_value_info(name, kind, [f"{name}{k}" for k in range(rank)])
        for name, (kind, rank) in inputs.items()
    ]
    told = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "model", infos, told)
    content: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    ).SerializeToString()
    return content


def run(backend: Backend, model: ModelProto, feeds: dict[str, Array], wanted: list[str]) -> list[Array]:
    return list(session_on(backend, model.SerializeToString(), "weights", []).run(wanted, feeds))


def session(backend: TensorRtBackend, content: bytes, by_body: bool = False) -> BuiltSession:
    made = session_on(backend, content, "model", [], by_body)
    assert isinstance(made, BuiltSession)
    return made


def test_integers_of_one_dimension_are_built_in(backend: TensorRtBackend) -> None:
    """Sizes and places: an engine for each. Of two dimensions they are data, and any value does."""
    nodes = [
        helper.make_node("Slice", ["x", "start", "end"], ["part"]),
        helper.make_node("Gather", ["x", "ids"], ["y"]),
    ]
    kinds = {"x": (TensorProto.FLOAT, 2), "start": (TensorProto.INT64, 1), "end": (TensorProto.INT64, 1),
             "ids": (TensorProto.INT64, 2)}  # fmt: skip
    ours = session(backend, model(nodes, kinds, "part", "y"))
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    engines = []
    for start, end, ids in ((0, 2, [[0, 1]]), (0, 2, [[3, 2]]), (1, 4, [[3, 2]]), (0, 2, [[0, 0]])):
        feeds = {"x": x, "start": np.array([start]), "end": np.array([end]), "ids": np.array(ids)}
        part, y = ours.run(None, feeds)
        np.testing.assert_array_equal(part, x[start:end])
        np.testing.assert_array_equal(y, x[ids])
        (only,) = ours.run(["y"], feeds)
        np.testing.assert_array_equal(only, y)
        engines += ours.engines.values()
    assert len(engines) == 4  # one at a time is kept
    assert engines[0] is engines[1]
    assert len({id(engine) for engine in engines}) == 3
    assert {name for engine in ours.engines.values() for name in engine.inputs} == {"x", "ids"}


def test_other_shapes_are_another_engine(backend: TensorRtBackend) -> None:
    ours = session(backend, model([helper.make_node("Neg", ["x"], ["y"])], {"x": (TensorProto.FLOAT, 2)}, "y"))
    for shape in ((2, 3), (5, 1), (2, 3)):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        np.testing.assert_array_equal(ours.run(None, {"x": x})[0], -x)
        assert [shapes for shapes, _ in ours.engines] == [(("x", shape),)]


def test_a_model_without_inputs(backend: TensorRtBackend) -> None:
    """The bundle's weights, as the engine finds them; and one that is made of sizes alone."""
    theirs = OrtBackend(backend.bundle, threads=1)
    wiring = Wiring(load_model_from_string(backend.bundle.graph_bytes("decode_text")))
    names = [name for name, tensor in wiring.weights.items() if tensor.data_location == TensorProto.EXTERNAL]
    ours, truth = (
        weights_through(partial(run, on), wiring, names) for on in (backend, theirs)
    )  # fmt: skip
    assert ours.keys() == truth.keys() == {*names} > set()
    for name in names:
        np.testing.assert_array_equal(ours[name], truth[name])

    like = model([helper.make_node("Range", ["from", "to", "by"], ["n"]), helper.make_node(
        "Cast", ["n"], ["y"], to=TensorProto.FLOAT)], dict.fromkeys(("from", "to", "by"), (TensorProto.INT64, 0)), "y",
    )  # fmt: skip
    (y,) = session(backend, like).run(None, {"from": np.array(1), "to": np.array(9), "by": np.array(3)})
    np.testing.assert_array_equal(y, [1, 4, 7])


def test_operators_by_plugin_and_by_body(backend: TensorRtBackend) -> None:
    manifest = backend.bundle.manifest
    subjects = subjects_of(backend.bundle)
    assert len(subjects) == 2
    for subject in subjects:
        assert forms_on(backend, subject.used, has_body=True) == [PLUGIN, BODY]
        assert forms_on(backend, subject.used, has_body=False) == [PLUGIN]
        case = Case(5, 2, False, 0)
        feeds = drawn(subject, {**sizes_of(manifest["config"]), "B": 2, "L": 5}, "float32", case)
        truth = definition(subject.operator, feeds, np.float64)
        plugins = []
        for by_body in (False, True):
            ours = session(backend, one_node(subject, "float32"), by_body)
            assert difference(ours.run(None, feeds)[0], truth).rms < 1e-5
            (engine,) = ours.engines.values()
            plugins.append([kind for kind, _ in engine.made._about["plugins"]])
        assert plugins == [[[subject.operator.name, "1", "mdm"]], []]


def test_what_is_refused(backend: TensorRtBackend, fails: Any) -> None:
    content = model([helper.make_node("Neg", ["x"], ["y"])], {"x": (TensorProto.FLOAT, 1)}, "y")
    feeds = {"x": np.ones(3, np.float32)}
    fails("build:1")
    with pytest.raises(EngineError, match="as planted"):
        session(backend, content).run(None, feeds)
    fails("deserialize:1")
    with pytest.raises(EngineError, match="does not load the engine"):
        session(backend, content).run(None, feeds)
    fails("")
    ours = session(backend, content)
    ours.run(None, feeds)
    fails("execute:1")
    with pytest.raises(EngineError, match="graph 'model' failed in TensorRT"):
        ours.run(None, feeds)
    unknown = model([helper.make_node("Nonsense", ["x"], ["y"], domain="other")], {"x": (TensorProto.FLOAT, 1)}, "y")
    with pytest.raises(MdmError, match="Nonsense"):
        session(backend, unknown).run(None, feeds)
