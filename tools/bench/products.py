"""The matrix products of a step, and nothing else: how fast the step could be if all the rest were free.

ONNX Runtime's profiler says which products a graph runs and on which shapes. A model with just these is built, each
product with weights of its own, and runs under the same session options, so that weights are packed the same way.
Profiling slows a session: it is done in one of its own, and only shares are taken from it, no times.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdm.runtime.lane import Lane
from mdm.runtime.model import Model
from mdm.runtime.ort import OrtBackend
from mdm.runtime.request import Request

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession, SessionOptions

OPERATORS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm")
CONTAINERS = ("Scan", "Loop", "If")  # the nodes of their bodies have times of their own
RUNS = 3  # that are counted, after one that warms up
ALIGN = 16  # floats

Event = dict[str, Any]  # a node's run, as the profiler writes it


@dataclass(frozen=True)
class Product:
    """x [..,K] times weights [K,N], perhaps plus a bias [N]."""

    x: tuple[int, ...]
    N: int
    bias: bool
    dtype: str  # ONNX Runtime's word: float or float16

    @property
    def constants(self) -> dict[str, tuple[int, ...]]:
        """Their shapes."""
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.x[-1], self.N), "bias": (self.N,)}
        return shapes if self.bias else {"weight": shapes["weight"]}


class Profiled(OrtBackend):
    """Its sessions write down the time of every node."""

    def __init__(self, like: OrtBackend, folder: str) -> None:
        super().__init__(like.bundle, like.name, threads=like.threads, device=like.number)
        self.folder = folder

    def options(self, operators: Collection[str]) -> SessionOptions:
        options = super().options(operators)
        options.enable_profiling = True
        options.profile_file_prefix = f"{self.folder}/profile"
        return options


def profile(backend: OrtBackend, requests: Sequence[Request]) -> list[list[Event]]:
    """The nodes of each run of the step graph, on the batch that these requests make."""
    with tempfile.TemporaryDirectory() as folder:
        engine = Profiled(backend, folder)
        model = Model(backend.bundle, engine)
        jobs = [model.prepare(request).job for request in requests]
        lane = Lane(engine, *jobs[0].lane, len(jobs))
        for job in jobs:
            lane.join(job)
        drawn = lane.write(1, len(jobs))
        for _ in range(1 + RUNS):
            lane.run(0, len(jobs), 1, drawn)
        graph = engine.loaded[lane.name]
        return runs_of(json.loads(Path(graph.session.end_profiling()).read_bytes()))[1:]


def runs_of(events: list[Event]) -> list[list[Event]]:
    """The nodes' events of each run, in order."""
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    ends = [*starts[1:], float("inf")]
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    nodes = [node for node in nodes if node["args"]["op_name"] not in CONTAINERS]
    return [[n for n in nodes if start <= n["ts"] < end] for start, end in zip(starts, ends, strict=True)]


def shares(runs: Sequence[Sequence[Event]]) -> dict[str, float]:
    """Of all nodes' time, the share of each operator, the largest first."""
    spent: Counter[str] = Counter()
    for run in runs:
        for node in run:
            spent[node["args"]["op_name"]] += node["dur"]
    return {operator: micros / max(1, spent.total()) for operator, micros in spent.most_common()}


def threads_of(runs: Sequence[Sequence[Event]]) -> int:
    """How many threads ran the nodes."""
    stats = [node["args"].get("thread_scheduling_stats") or {} for run in runs for node in run]
    return 1 + max(len(one.get("sub_threads", {})) for one in stats)


def products_of(run: Sequence[Event]) -> list[Product]:
    """The products with weights in one run's events, in order.

    Packed weights are not among a node's inputs there. Products of two activations, which only the body of a scan has,
    count as part of the scan.
    """
    found = []
    for node in run:
        facts = node["args"]
        if facts["op_name"] not in OPERATORS:
            continue
        [(dtype, x), *others] = [next(iter(entry.items())) for entry in facts["input_type_shape"]]
        [(_, out)] = facts["output_type_shape"][0].items()
        if any(len(shape) > 1 for _, shape in others) and int(facts["parameter_size"]) == 0:
            continue
        found.append(Product(tuple(x), out[-1], any(len(shape) == 1 for _, shape in others), dtype))
    return found


def names_of(products: Sequence[Product]) -> dict[tuple[tuple[int, ...], str], str]:
    """Shape and type of x -> the input's name. Products that want the same share one."""
    wanted = dict.fromkeys((product.x, product.dtype) for product in products)
    return {key: f"x_{number}" for number, key in enumerate(wanted)}


def products_model(products: Sequence[Product]) -> ModelProto:
    """A model of these products; their weights are given with the session.

    Of each result one number is an output, so that no product can be left out and no result has to be kept.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    types = {"float": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    names = names_of(products)
    initializers, nodes, outputs = [], [], []
    for rank in {len(product.x) for product in products}:
        initializers.append(numpy_helper.from_array(np.zeros(rank, np.int64), f"from_{rank}"))
        initializers.append(numpy_helper.from_array(np.ones(rank, np.int64), f"to_{rank}"))
    for number, product in enumerate(products):
        rank, dtype = len(product.x), types[product.dtype]
        constants = {f"{kind}_{number}": shape for kind, shape in product.constants.items()}
        for name, shape in constants.items():
            tensor = TensorProto(name=name, dims=shape, data_type=dtype, data_location=TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value="given with the session")
            initializers.append(tensor)
        words = [names[product.x, product.dtype], *constants]
        nodes.append(helper.make_node("Gemm" if product.bias else "MatMul", words, [f"y_{number}"]))
        nodes.append(helper.make_node("Slice", [f"y_{number}", f"from_{rank}", f"to_{rank}"], [f"corner_{number}"]))
        outputs.append(helper.make_tensor_value_info(f"corner_{number}", dtype, [1] * rank))
    inputs = [helper.make_tensor_value_info(name, types[t], x) for (x, t), name in names.items()]
    graph = helper.make_graph(nodes, "products", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def products_session(
    products: Sequence[Product], backend: OrtBackend, graph: str
) -> tuple[InferenceSession, dict[str, Any]]:
    """The products alone in a session with the options of that graph's, and what to feed it."""
    import numpy as np
    import onnxruntime

    model = products_model(products)
    # Every constant is a window of its own into one array of random numbers: no two are equal, and before they are
    # packed they take next to no memory.
    kinds = {"float": np.float32, "float16": np.float16}
    largest = max(math.prod(shape) for product in products for shape in product.constants.values())
    chance = np.random.default_rng(0)
    numbers = chance.standard_normal(largest + ALIGN * len(products), np.float32)
    pools = {dtype: numbers.astype(kinds[dtype]) for dtype in {product.dtype for product in products}}
    constants = {}
    for number, product in enumerate(products):
        for kind, shape in product.constants.items():
            window = pools[product.dtype][ALIGN * number :][: math.prod(shape)].reshape(shape)
            constants[f"{kind}_{number}"] = onnxruntime.OrtValue.ortvalue_from_numpy(window)
    options = backend.options(backend.bundle.graph(graph)["operators"])
    options.add_external_initializers(list(constants), list(constants.values()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[backend.provider_options()])
    feeds = {
        name: chance.standard_normal(x, np.float32).astype(kinds[t]) for (x, t), name in names_of(products).items()
    }
    return session, feeds
