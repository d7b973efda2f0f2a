"""The model of matrix products holds exactly the products of a step graph, and running it runs all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch (extra export) is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime (extra cpu or gpu) is not installed")

import onnx
from safetensors.torch import save_file

from mdm.export import export_bundle
from mdm.reference import SHIPPED_TOKENIZER, build_model, load_config
from mdm.runtime.bundle import Bundle, open_bundle
from mdm.runtime.model import Model
from mdm.runtime.ort import OrtBackend
from mdm.tools.bench.bundle import requests_for
from mdm.tools.bench.products import (
    Event,
    Product,
    Profiled,
    products_model,
    products_of,
    products_session,
    profile,
    runs_of,
    shares,
    threads_of,
)

GRAPH, BATCH = "step_image_guided", 3
Bundles = dict[str, Bundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., dict[str, Any]]) -> Bundles:
    """A tiny bundle of each family."""
    made = {}
    for family, tokenizer in (("dim", None), ("mdm", SHIPPED_TOKENIZER)):
        folder = tmp_path_factory.mktemp(family)
        config = load_config(tiny(family=family))
        save_file(build_model(config).state_dict(), folder / "model.safetensors")
        out = folder / "out.bundle"
        export_bundle(folder / "model.safetensors", config, out, tokenizer=tokenizer, validate=False)
        made[family] = open_bundle(out)
    return made


def profiled(bundle: Bundle) -> list[list[Event]]:
    requests = requests_for(Model(bundle, OrtBackend(bundle)), "class_to_image", None, BATCH)
    return profile(OrtBackend(bundle, threads=1), requests)


def weights_in(bundle: Bundle) -> Counter[tuple[int, ...]]:
    """[K,N] of each matrix product of the file; the exporter stores weights as PyTorch does and transposes them."""
    graph = onnx.load(str(bundle.path / f"{GRAPH}.onnx"), load_external_data=False).graph
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    made_by = {node.output[0]: node for node in graph.node}
    found = []
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            transpose = made_by[node.input[1]]
            assert transpose.op_type == "Transpose"
            found.append(stored[transpose.input[0]][::-1])
    return Counter(found)


@pytest.mark.parametrize("family", ["dim", "mdm"])
def test_products_are_those_of_the_graph(bundles: Bundles, family: str) -> None:
    runs = profiled(bundles[family])
    assert len(runs) == 3
    products = products_of(runs[0])
    assert all(products_of(run) == products for run in runs)
    assert Counter(product.constants["weight"] for product in products) == weights_in(bundles[family])
    assert {product.x[0] for product in products} == {2 * BATCH}  # guidance doubles the batch


@pytest.mark.parametrize("family", ["dim", "mdm"])
def test_running_the_products_runs_each_of_them(bundles: Bundles, family: str, tmp_path: Path) -> None:
    products = products_of(profiled(bundles[family])[0])
    backend = Profiled(OrtBackend(bundles[family], threads=1), str(tmp_path))
    session, feeds = products_session(products, backend, GRAPH)
    assert {value.shape for value in feeds.values()} == {product.x for product in products}
    results = session.run(None, feeds)
    assert len(results) == len(products)
    assert len({float(result.item()) for result in results}) == len(products)  # each has weights of its own
    [run] = runs_of(json.loads(Path(session.end_profiling()).read_bytes()))
    assert Counter(products_of(run)) == Counter(products)
    assert {node["args"]["op_name"] for node in run} <= {"MatMul", "Gemm", "Slice"}


def test_the_model_is_sound_in_both_types() -> None:
    products = [Product((2, 5, 8), 4, False, "float"), Product((2, 8), 4, True, "float16")]
    model = products_model(products)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Slice", "Gemm", "Slice"]
    assert [tuple(t.dims) for t in model.graph.initializer if t.data_type != onnx.TensorProto.INT64] == [
        (8, 4), (8, 4), (4,)
    ]  # fmt: skip
    inputs = [[dim.dim_value for dim in info.type.tensor_type.shape.dim] for info in model.graph.input]
    assert inputs == [[2, 5, 8], [2, 8]]


def event(operator: str, start: int, micros: int, inputs: list[list[int]], out: list[int], parameters: int) -> Event:
    """A node's run, as ONNX Runtime's profiler writes it."""
    facts = {
        "op_name": operator, "input_type_shape": [{"float": shape} for shape in inputs],
        "output_type_shape": [{"float": out}], "parameter_size": str(parameters),
        "thread_scheduling_stats": {"sub_threads": {"1": {}, "2": {}}},
    }  # fmt: skip
    return {"cat": "Node", "name": f"n{start}_kernel_time", "ts": start, "dur": micros, "args": facts}


def test_what_counts_as_a_product() -> None:
    packed = event("MatMul", 0, 60, [[2, 8]], [2, 4], 0)
    shown = event("Gemm", 1, 20, [[2, 8], [8, 4], [4]], [2, 4], 144)
    activations = event("MatMul", 2, 10, [[2, 8], [8, 4]], [2, 4], 0)
    other = event("Add", 3, 10, [[2, 8], [8]], [2, 8], 32)
    nodes = [packed, shown, activations, other]
    assert products_of(nodes) == [Product((2, 8), 4, False, "float"), Product((2, 8), 4, True, "float")]
    assert shares([nodes]) == {"MatMul": 0.7, "Gemm": 0.2, "Add": 0.1}
    assert threads_of([nodes]) == 3


def test_events_are_told_apart_by_run() -> None:
    runs = [{"cat": "Session", "name": "model_run", "ts": start, "dur": 50} for start in (200, 100)]
    nodes = [event("Add", start, 1, [[2]], [2], 0) for start in (110, 120, 210)]
    loop = event("Scan", 205, 40, [[2]], [2], 0)  # its body's nodes are there themselves
    early = {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 90, "args": {}}
    assert runs_of([early, *runs, *nodes, loop]) == [nodes[:2], nodes[2:]]
