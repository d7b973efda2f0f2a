"""The float32 twin of a bfloat16 graph: the same nodes, the same weight values, another type.

ONNX Runtime's CPU provider has no bfloat16. The twin is made of the finished file, so whatever is wrong with that
file's nodes, names or offsets is wrong with the twin too; only the rounding of activations is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto


def write_twin(source: Path, target: Path) -> None:
    """The twin of the graph `source`; its weights go to a file of the graph's own."""
    model = onnx.load(str(source), load_external_data=False)
    data = target.with_suffix(".bin")
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            values = _widened(tensor, source.parent)
            if tensor.data_location != TensorProto.EXTERNAL:
                tensor.raw_data = values
            else:
                del tensor.external_data[:]
                for key, value in (("location", data.name), ("offset", file.tell()), ("length", len(values))):
                    tensor.external_data.add(key=key, value=str(value))
                file.write(values)
            if tensor.data_type == TensorProto.BFLOAT16:
                tensor.data_type = TensorProto.FLOAT
    _retype(model.graph.node)
    for function in model.functions:
        _retype(function.node)
    target.write_bytes(model.SerializeToString())


def _widened(tensor: TensorProto, folder: Path) -> bytes:
    content = tensor.raw_data
    if tensor.data_location == TensorProto.EXTERNAL:
        at = {entry.key: entry.value for entry in tensor.external_data}
        with (folder / at["location"]).open("rb") as file:
            file.seek(int(at["offset"]))
            content = file.read(int(at["length"]))
    if tensor.data_type != TensorProto.BFLOAT16:
        return content
    return (np.frombuffer(content, "<u2").astype("<u4") << 16).tobytes()  # the upper half of a float32


def _retype(nodes: Iterable[NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if isinstance(attribute.g, GraphProto):
                _retype(attribute.g.node)
