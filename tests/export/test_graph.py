"""The graph builder: constants, names, types, and what the finished file declares."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from mdm.export.graph import Graph
from mdm.plugins.contract import DOMAIN, SELECTIVE_SCAN, VERSION

FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 0.1, 1.0, 6.1, 1e-45]), st.floats(width=32)
)
ARRAYS = st.one_of(FLOATS, st.lists(FLOATS, max_size=7), st.lists(st.lists(FLOATS, min_size=2, max_size=2), max_size=3))
NAN = float(np.array(0x7FC0_0001, "<u4").view("<f4"))  # prints like any other


def bits(tensor: TensorProto) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.dims), tensor.raw_data


@settings(max_examples=200, deadline=None)
@given(values=st.lists(ARRAYS, min_size=2, max_size=8), dtype=st.sampled_from(["float32", "float16", "bfloat16"]))
def test_constants_are_one_where_their_bits_are(
    values: list[float], dtype: str, blank_graph: Callable[..., Graph]
) -> None:
    g = blank_graph()
    with np.errstate(over="ignore"):
        made = [(g.constant(np.asarray(v, np.float32), dtype).name, np.asarray(v, np.float32)) for v in values]
        fresh = [bits(blank_graph_constant(blank_graph(), array, dtype)) for _, array in made]
    for (name, array), own in zip(made, fresh, strict=True):
        assert bits(g.constants[name]) == own  # whatever else the graph holds
        for other, second in made:
            assert (name == other) or array.tobytes() != second.tobytes() or array.shape != second.shape
    assert all(g.constants[name].name == name for name in g.constants)


def blank_graph_constant(g: Graph, value: np.ndarray, dtype: str) -> TensorProto:
    return g.constants[g.constant(value, dtype).name]


@pytest.mark.parametrize(
    "pair",
    [(0.0, -0.0), (0.1, float(np.nextafter(np.float32(0.1), 1))), (math.nan, NAN), (1.0, np.ones(1)), (0, np.ones(0))],
    ids=["zeros", "one print", "nans", "shapes", "empty"],
)
def test_constants_that_look_alike_stay_apart(pair: tuple[float, float], blank_graph: Callable[..., Graph]) -> None:
    g = blank_graph()
    first, second = (g.constant(np.asarray(value, np.float32), "float32").name for value in pair)
    assert first != second
    assert g.constant(np.asarray(pair[0], np.float32), "float32").name == first
    assert g.constant(np.asarray(pair[1], np.float32), "float32").name == second
    assert len(g.constants) == 2


def test_a_third_lookalike_finds_its_own(blank_graph: Callable[..., Graph]) -> None:
    g, value, values = blank_graph(), np.float32(0.1), []
    for _ in range(4):
        values.append(value)
        value = np.nextafter(value, np.float32(1))
    names = [g.constant(v, "float32").name for v in values]
    assert len(set(names)) == 4
    assert [g.constant(v, "float32").name for v in values] == names


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [0.0, -0.0, 0.5, -1.0, 2.0, 1000.0, 96.0, 2.0**-14, math.inf])
def test_constants_in_use_are_exact(value: float, dtype: str, blank_graph: Callable[..., Graph]) -> None:
    tensor = blank_graph_constant(blank_graph(), np.asarray(value), dtype)
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.float64), value)


@pytest.mark.parametrize("width", [512, 128, 192, 320])
def test_bfloat16_constants_are_the_nearest(width: int, blank_graph: Callable[..., Graph]) -> None:
    """What the autoencoder's attention scales by is the one number in use that bfloat16 does not hold."""
    tensor = blank_graph_constant(blank_graph(), np.asarray(width**-0.5), "bfloat16")
    assert float(numpy_helper.to_array(tensor)) == float(torch.tensor(width**-0.5).bfloat16())


def test_types_that_differ_are_refused_with_their_place(blank_graph: Callable[..., Graph]) -> None:
    g = blank_graph()
    x, y = g.input("x", "float32", [2]), g.input("y", "float16", [2])
    with (
        g.scope("backbone", "blocks", 3),
        pytest.raises(TypeError, match=r"backbone\.blocks\.3: Add of x float32, y fl"),
    ):
        _ = x + y


def test_numbers_take_the_type_of_the_value_beside_them(blank_graph: Callable[..., Graph]) -> None:
    g = blank_graph()
    x = g.input("x", "float16", [2])
    assert {v.dtype for v in (x + 1.0, 1.0 + x, 2 * x, 1.0 - x, x / 3)} == {"float16"}
    assert {t.data_type for t in g.constants.values()} == {TensorProto.FLOAT16}


def test_operators_compute_what_they_say(
    blank_graph: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    g = blank_graph()
    x, k = g.input("x", "float32", [4, 6]), g.input("k", "int64", [2])
    parts = g.split(x, [1, 5])
    made = [
        x + 1.0, 2.0 - x, 3.0 * x, x / 2.0, x - x * x, x[k], g.slice(x, 1, -2), g.slice(x, 0, 1, 3), parts[1],
        g.reshape(x, 0, 2, -1), g.unsqueeze(x, 0, 3), g.transpose(x, 1, 0), g.dim(x, 1), g.concat(0, x, x),
        g.cast(x, "float16"),
    ]  # fmt: skip
    for place, value in enumerate(made):
        g.output(f"y{place}", value, [f"n{place}{axis}" for axis in range({9: 3, 10: 4, 12: 1}.get(place, 2))])
    v, at = np.arange(24, dtype=np.float32).reshape(4, 6) + 1, np.array([2, 0])
    expected = [
        v + 1, 2 - v, 3 * v, v / 2, v - v * v, v[at], v[:, -2:], v[1:3], v[:, 1:], v.reshape(4, 2, 3),
        v[None, :, :, None], v.T, np.array([6]), np.concatenate([v, v]), v.astype(np.float16),
    ]  # fmt: skip
    for found, wanted in zip(run_graph(g, x=v, k=at), expected, strict=True):
        assert found.dtype == wanted.dtype
        assert np.array_equal(found, wanted)


def test_what_changes_nothing_makes_no_node(blank_graph: Callable[..., Graph]) -> None:
    g = blank_graph()
    x = g.input("x", "float32", [2])
    assert g.cast(x, "float32") is x
    assert g.concat(0, x) is x
    assert not g.nodes


def test_names_follow_scopes_and_copies_and_are_unique(blank_graph: Callable[..., Graph]) -> None:
    g = blank_graph({"blocks.0.norm.weight": torch.ones(2)})
    x = g.input("x", "float32", [2])

    def norm() -> list[str]:
        with g.scope("blocks", 0), g.scope("norm"):
            return [(x * g.weight("weight", "float32")).name, (x * x).name]

    first = norm()
    with g.copy("low"):
        second = norm()
        assert g.path == ""
    assert first == ["blocks.0.norm.Mul", "blocks.0.norm.Mul_1"]
    assert second == ["low.blocks.0.norm.Mul", "low.blocks.0.norm.Mul_1"]
    assert norm() == ["blocks.0.norm.Mul_2", "blocks.0.norm.Mul_3"]
    assert list(g.stored) == ["blocks.0.norm.weight"]  # both copies use the same weights
    pieces = g.split(x, [1, 1])
    assert [piece.name for piece in pieces] == ["Split.0", "Split.1"]
    names = [output for node in g.nodes for output in node.output]
    assert len({node.name for node in g.nodes}) == len(g.nodes)
    assert len(set(names)) == len(names)


def scanning(g: Graph) -> Graph:
    dims = [spec.dims for spec in SELECTIVE_SCAN.required]
    inputs = [g.input(spec.name, "float32", list(d)) for spec, d in zip(SELECTIVE_SCAN.required, dims, strict=True)]
    g.output("y", g.op(SELECTIVE_SCAN.name, *inputs, domain=DOMAIN, has=0), list(dims[0]))
    return g


@pytest.mark.parametrize("opset", range(20, 26))
def test_only_a_graph_with_scans_imports_their_domain(opset: int, blank_graph: Callable[..., Graph]) -> None:
    plain = blank_graph(opset=opset)
    plain.output("y", plain.input("x", "float32", [2]) + 1.0, [2])
    model = plain.model()
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset}
    assert not model.functions
    model = scanning(blank_graph(opset=opset)).model()
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": opset, DOMAIN: VERSION}
    assert [function.name for function in model.functions] == [SELECTIVE_SCAN.name]
    assert {entry.version for entry in model.functions[0].opset_import if not entry.domain} == {opset}


def test_equal_graphs_are_equal_bytes(blank_graph: Callable[..., Graph]) -> None:
    made = [scanning(blank_graph({"w": torch.ones(2)})).model() for _ in range(2)]
    assert made[0].SerializeToString(deterministic=True) == made[1].SerializeToString(deterministic=True)
