"""Some nodes of a file as a model of their own, which any backend can run, and that model in a folder.

It has the file's weights, functions and opsets. A bfloat16 tensor goes in and out as float32, because numpy has no such
type: a Cast stands before it or behind it, and changes no value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper
from safetensors.numpy import save_file

from mdm.plugins.contract import DOMAIN, SELECTIVE_SCAN
from mdm.tools.check.finding import Array, Limits
from mdm.tools.check.nodes.evaluator import lies_outside
from mdm.tools.check.nodes.replay import CASE, MODEL, README, WEIGHTS, about
from mdm.tools.check.nodes.wiring import FLOATS, Wiring

Run = Callable[[ModelProto, dict[str, Array], list[str]], list[Array]]  # model, inputs, outputs wanted
INLINE = 64_000_000  # bytes of weights in model.onnx itself
NUMPY = {"float32": np.float32, "float16": np.float16, "float64": np.float64, "bfloat16": np.float32}


@dataclass(frozen=True)
class SubModel:
    """`wanted`: tensor of the file -> output of the model; inputs likewise have the model's names."""

    model: ModelProto
    feeds: dict[str, Array]
    wanted: dict[str, str]

    def run(self, run: Run) -> dict[str, Array]:
        found = run(self.model, self.feeds, list(self.wanted.values()))
        return dict(zip(self.wanted, found, strict=True))


def cut_out(wiring: Wiring, numbers: Sequence[int], feeds: Mapping[str, Array], outputs: Sequence[str]) -> SubModel:
    """The nodes `numbers` from these inputs. Weights stay where the file has them."""
    inputs, named, casts = [], {}, []
    for name, array in feeds.items():
        kind = wiring.types[name]
        into = name
        if kind == TensorProto.BFLOAT16:
            into = f"{name}.float32"
            casts.append(helper.make_node("Cast", [into], [name], name=f"{name}.from_float32", to=kind))
            kind = TensorProto.FLOAT
        inputs.append(helper.make_tensor_value_info(into, kind, array.shape))
        named[into] = array.astype(NUMPY[FLOATS[kind]]) if kind in FLOATS else array
    nodes = [wiring.nodes[number] for number in numbers]
    model = _model_of(wiring, [*casts, *nodes], inputs, wiring.weights_of(numbers))
    return _with_outputs(model, wiring, outputs, named)


def with_probes(wiring: Wiring, probes: Sequence[str], feeds: dict[str, Array]) -> SubModel:
    """The whole file, which also gives these tensors."""
    model = ModelProto()
    model.CopyFrom(wiring.model)
    return _with_outputs(model, wiring, probes, feeds)


def _model_of(
    wiring: Wiring, nodes: Sequence[NodeProto], inputs: Sequence[onnx.ValueInfoProto], weights: Sequence[str]
) -> ModelProto:
    whole = wiring.model
    kept = [wiring.weights[name] for name in weights]
    graph = helper.make_graph(nodes, f"part of {whole.graph.name}", inputs, [], kept)
    domains = {node.domain for node in nodes}
    return helper.make_model(
        graph, ir_version=whole.ir_version, producer_name=whole.producer_name,
        opset_imports=[o for o in whole.opset_import if o.domain in domains | {""}],
        functions=[f for f in whole.functions if f.domain in domains],
    )  # fmt: skip


def _with_outputs(model: ModelProto, wiring: Wiring, outputs: Sequence[str], feeds: dict[str, Array]) -> SubModel:
    known, wanted = {output.name for output in model.graph.output}, {}
    for name in outputs:
        kind, given = wiring.types[name], name
        if kind == TensorProto.BFLOAT16:
            given, kind = f"{name}.float32", int(TensorProto.FLOAT)
            model.graph.node.append(helper.make_node("Cast", [name], [given], name=f"{name}.to_float32", to=kind))
        if given not in known:
            model.graph.output.append(helper.make_tensor_value_info(given, kind, None))
        wanted[name] = given
    return SubModel(model, feeds, wanted)


def weights_through(run: Run, wiring: Wiring, names: Sequence[str]) -> dict[str, Array]:
    """Weights that lie outside the file, as the backend finds them there. bfloat16 as float32."""
    copies = [helper.make_node("Identity", [name], [f"{name}.copy"], name=f"{name}.copy") for name in names]
    model = _model_of(wiring, copies, [], names)
    for name in names:
        wiring.types[f"{name}.copy"] = wiring.weights[name].data_type
    found = _with_outputs(model, wiring, [f"{name}.copy" for name in names], {}).run(run)
    return {name: found[f"{name}.copy"] for name in names}


def write_case(
    folder: Path, part: SubModel, wiring: Wiring, truth: Mapping[str, Array], limits: Mapping[str, Limits],
    run: Run, said: str,
) -> None:  # fmt: skip
    """`truth` and `limits` by tensor of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    model = ModelProto()
    model.CopyFrom(part.model)
    outside = [tensor for tensor in model.graph.initializer if lies_outside(tensor)]
    values = weights_through(run, wiring, [tensor.name for tensor in outside]) if outside else {}
    for tensor in outside:
        array = values[tensor.name]
        if tensor.data_type == TensorProto.BFLOAT16:
            array = (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
        tensor.raw_data = array.tobytes()
    (folder / WEIGHTS).unlink(missing_ok=True)  # onnx would append to it
    large = sum(array.nbytes for array in values.values()) > INLINE
    onnx.save(model, folder / MODEL, save_as_external_data=large, location=WEIGHTS, size_threshold=1024)
    arrays = {f"in.{name}": array for name, array in part.feeds.items()}
    arrays |= {f"out.{given}": truth[name] for name, given in part.wanted.items()}
    looped = any(node.domain == DOMAIN and node.op_type == SELECTIVE_SCAN.name for node in part.model.graph.node)
    named = {given: limits[name] for name, given in part.wanted.items()}
    save_file({n: np.array(a, order="C") for n, a in arrays.items()}, folder / CASE, about(named, looped))
    (folder / README).write_text(
        f"{said}\n\n{MODEL} holds the node with its weights, {CASE} its inputs (in.*), the true outputs (out.*)\n"
        "and how far from them an output may be. To run it again,\n"
        f"on another backend than ort-cpu with --backend NAME:\n\n    mdm check --replay {folder.name}\n"
    )
