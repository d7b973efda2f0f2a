"""An ONNX graph under construction: values that compute like tensors, names that follow the module path.

    with graph.scope("blocks.3.norm"):
        y = x * graph.weight("weight", "float32") + 1.0      # nodes blocks.3.norm.Mul and blocks.3.norm.Add

The graph is built directly, not traced: what a node is called, which type it has and where its weights lie is then
decided here, and 49 blocks take milliseconds. That it computes what the PyTorch model computes is measured on every
export (`validate.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from mdm.export.precision import Precision
from mdm.export.weights import Stored, Weights
from mdm.plugins.contract import DOMAIN, VERSION
from mdm.plugins.functions import TYPES, attach_functions, operator_nodes

ONNX_TYPES = TYPES | {"int64": TensorProto.INT64, "bool": TensorProto.BOOL}
IR_VERSION = 10  # read by ONNX Runtime 1.18 and later
SAME_TYPES = ("Add", "Sub", "Mul", "Div", "MatMul", "Concat", "Conv", "Pow")  # operators whose inputs share one type
Dims = Sequence[int | str]


@dataclass(frozen=True, eq=False)
class Value:
    """One tensor of the graph. Numbers beside it become constants of its type; `v[index]` gathers along axis 0."""

    graph: Graph
    name: str
    dtype: str

    def __add__(self, other: Operand) -> Value:
        return self.graph.op("Add", self, other)

    def __sub__(self, other: Operand) -> Value:
        return self.graph.op("Sub", self, other)

    def __mul__(self, other: Operand) -> Value:
        return self.graph.op("Mul", self, other)

    def __truediv__(self, other: Operand) -> Value:
        return self.graph.op("Div", self, other)

    def __radd__(self, other: float) -> Value:
        return self + other

    def __rmul__(self, other: float) -> Value:
        return self * other

    def __rsub__(self, other: float) -> Value:
        return self.graph.op("Sub", self.graph.constant(other, self.dtype), self)

    def __getitem__(self, index: Value) -> Value:
        return self.graph.op("Gather", self, index, axis=0)


Operand = Value | float | int


class Graph:
    """Nodes, inputs, outputs and the weights they use. `model` makes the file's content of it."""

    def __init__(self, name: str, weights: Weights, precision: Precision, opset: int) -> None:
        self.name, self.weights, self.precision, self.opset = name, weights, precision, opset
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.stored: dict[str, Stored] = {}  # initializer -> where its values lie
        self.constants: dict[str, TensorProto] = {}
        self._path: list[str] = []
        self._copy: list[str] = []
        self._taken: dict[str, int] = {}

    # ------------------------------------------------------------------------------------------- names and types

    @contextmanager
    def scope(self, *parts: str | int, root: bool = False) -> Iterator[None]:
        """Names of what is made inside begin with this module's path; `root`: with nothing before it."""
        outer = self._path
        self._path = [*([] if root else outer), *map(str, parts)]
        try:
            yield
        finally:
            self._path = outer

    @contextmanager
    def copy(self, label: str) -> Iterator[None]:
        """Nodes made inside are a second copy of a network: other names, the same weights."""
        self._copy.append(label)
        try:
            yield
        finally:
            self._copy.pop()

    @property
    def path(self) -> str:
        return ".".join(self._path)

    def dtype(self, role: str) -> str:
        """The type that work of this role is done in, at this place of the network."""
        return self.precision.dtype(role, self.path)

    def _unique(self, leaf: str) -> str:
        name = ".".join([*self._copy, *self._path, leaf])
        count = self._taken[name] = self._taken.get(name, -1) + 1
        return name if count == 0 else f"{name}_{count}"

    # ------------------------------------------------------------------------------------------------------ nodes

    def op(
        self,
        op_type: str,
        *operands: Operand,
        dtype: str | None = None,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> Value:
        """One node with one output, of the type of its first input unless said."""
        return self.split_op(op_type, 1, *operands, dtype=dtype, domain=domain, name=name, **attributes)[0]

    def split_op(
        self,
        op_type: str,
        outputs: int,
        *operands: Operand,
        dtype: str | Sequence[str] | None = None,
        domain: str = "",
        name: str | None = None,
        **attributes: Any,
    ) -> list[Value]:
        """One node with several outputs."""
        first = next(v for v in operands if isinstance(v, Value))
        inputs = [v if isinstance(v, Value) else self.constant(v, first.dtype) for v in operands]
        if op_type in SAME_TYPES and len({v.dtype for v in inputs}) > 1:
            raise TypeError(f"{self.path}: {op_type} of {', '.join(f'{v.name} {v.dtype}' for v in inputs)}")
        label = self._unique(name or op_type)
        names = [label] if outputs == 1 else [f"{label}.{place}" for place in range(outputs)]
        types = [dtype or first.dtype] * outputs if dtype is None or isinstance(dtype, str) else list(dtype)
        self.nodes.append(
            helper.make_node(op_type, [v.name for v in inputs], names, name=label, domain=domain, **attributes)
        )
        return [Value(self, output, kind) for output, kind in zip(names, types, strict=True)]

    def cast(self, value: Value, dtype: str) -> Value:
        return value if value.dtype == dtype else self.op("Cast", value, dtype=dtype, to=ONNX_TYPES[dtype])

    def concat(self, axis: int, *values: Value) -> Value:
        return values[0] if len(values) == 1 else self.op("Concat", *values, axis=axis)

    def split(self, value: Value, sizes: Sequence[int], axis: int = -1) -> list[Value]:
        return self.split_op("Split", len(sizes), value, self.ints(*sizes), axis=axis)

    def reshape(self, value: Value, *sizes: int) -> Value:
        """0 keeps a dimension, -1 takes what is left."""
        return self.op("Reshape", value, self.ints(*sizes))

    def transpose(self, value: Value, *perm: int) -> Value:
        return self.op("Transpose", value, perm=perm)

    def slice(self, value: Value, axis: int, start: int, end: int | None = None) -> Value:
        """value[start:end] along one axis; negative numbers count from its end."""
        last = np.iinfo(np.int64).max if end is None else end
        return self.op("Slice", value, self.ints(start), self.ints(int(last)), self.ints(axis))

    def unsqueeze(self, value: Value, *axes: int) -> Value:
        return self.op("Unsqueeze", value, self.ints(*axes))

    def dim(self, value: Value, axis: int) -> Value:
        """One dimension -> int64 [1]."""
        return self.op("Shape", value, dtype="int64", start=axis, end=axis + 1)

    # -------------------------------------------------------------------------------------------------- constants

    def ints(self, *values: int) -> Value:
        return self.constant(np.array(values, dtype=np.int64), "int64")

    def constant(self, value: float | np.ndarray, dtype: str) -> Value:
        """A constant in the file; equal ones are one."""
        array = np.asarray(value)
        shown = "x".join(map(str, array.shape))
        if array.size <= 4:
            shown = "_".join([*([shown] if shown else []), *(f"{v:g}" for v in array.flatten().tolist())])
        name = f"constant.{dtype}.{shown}"
        tensor = _tensor(array, dtype)
        copies = 0
        while (same := self.constants.get(name)) is not None and same.raw_data != tensor.raw_data:
            copies += 1
            name = f"constant.{dtype}.{shown}.{copies}"
        tensor.name = name
        self.constants[name] = tensor
        return Value(self, name, dtype)

    def weight(self, name: str, dtype: str, rows: tuple[int, int] | None = None) -> Value:
        """A tensor of the checkpoint below this path, as such; `rows`: only these of its first axis that is not 1."""
        return self.stored_value(self.weights.parameter(".".join([*self._path, name]), dtype, rows))

    def stored_value(self, stored: Stored) -> Value:
        self.stored[stored.name] = stored
        return Value(self, stored.name, stored.dtype)

    # -------------------------------------------------------------------------------------------------- the whole

    def input(self, name: str, dtype: str, shape: Dims) -> Value:
        self.inputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[dtype], list(shape)))
        return Value(self, name, dtype)

    def output(self, name: str, value: Value, shape: Dims) -> None:
        self.nodes.append(helper.make_node("Identity", [value.name], [name], name=name))
        self.outputs.append(helper.make_tensor_value_info(name, ONNX_TYPES[value.dtype], list(shape)))

    def model(self) -> ModelProto:
        """The model without its weights' places: `Weights.place` writes those once they are known."""
        initializers = [self.constants[name] for name in sorted(self.constants)]
        for name, stored in sorted(self.stored.items()):
            initializers.append(TensorProto(name=name, data_type=ONNX_TYPES[stored.dtype], dims=stored.shape))
        graph = helper.make_graph(self.nodes, self.name, self.inputs, self.outputs, initializers)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid(DOMAIN, VERSION)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="mdm-deploy")
        if operator_nodes(model):
            attach_functions(model, self.precision.activations)
        else:
            del model.opset_import[1]
        return model


def _tensor(array: np.ndarray, dtype: str) -> TensorProto:
    if dtype == "bfloat16":  # numpy has none
        raw = torch.from_numpy(array.astype(np.float32)).bfloat16().view(torch.int16).numpy().tobytes()
    else:
        raw = array.astype(dtype).tobytes()
    return TensorProto(data_type=ONNX_TYPES[dtype], dims=array.shape, raw_data=raw)
