"""A graph node by node in torch: in float64, which is the truth, or in its own types, which gives the noise floor.

    truth = Evaluation(model, values, exact=True).run(inputs)

Exact: every float is float64, and a Cast to a float type is one to float64. Deployed: the graph's own types; what is in
half precision is computed in float32 and rounded once a node, as ONNX Runtime's CPU and tensor cores do it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.tools.check.finding import Array
from mdm.tools.check.nodes.torch_operators import OPERATORS, Function

DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32, TensorProto.FLOAT16: torch.float16, TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.DOUBLE: torch.float64, TensorProto.INT64: torch.int64, TensorProto.INT32: torch.int32,
    TensorProto.BOOL: torch.bool,
}  # fmt: skip
HALF = (torch.float16, torch.bfloat16)


def compute(node: NodeProto, inputs: Sequence[Tensor | None], exact: bool) -> list[Tensor]:
    """What one node makes of its inputs; None is one that is absent."""
    return Step(node, exact).apply(inputs)


class Step:
    """A node whose attributes have been read."""

    def __init__(self, node: NodeProto, exact: bool) -> None:
        self.exact = exact
        self.inputs, self.outputs = list(node.input), list(node.output)
        self.to: torch.dtype | None = None
        written = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Cast" and not node.domain:
            kind = DTYPES[written["to"]]
            self.to = torch.float64 if exact and kind.is_floating_point else kind
        else:
            self.function = function_of(node, written)

    def apply(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        if self.to is not None:
            assert inputs[0] is not None
            return [inputs[0].to(self.to)]
        half = None
        if self.exact:
            inputs = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
        else:
            kind = next((x.dtype for x in inputs if x is not None and x.is_floating_point()), None)
            half = kind if kind in HALF else None
            inputs = [x.float() if x is not None and x.dtype in HALF else x for x in inputs]
        found = self.function(*inputs)
        outputs = [found] if isinstance(found, Tensor) else list(found)
        return outputs if half is None else [y.to(half) if y.is_floating_point() else y for y in outputs]


def function_of(node: NodeProto, written: Mapping[str, object]) -> Function:
    name = ".".join(part for part in (node.domain, node.op_type) if part)
    factory = OPERATORS.get((node.domain, node.op_type))
    if factory is None:
        raise InputError(f"node '{node.name}': operator {name} is none of those that the exporter writes")
    texts = {key: value.decode() if isinstance(value, bytes) else value for key, value in written.items()}
    try:
        return factory(**texts)
    except (TypeError, ValueError) as error:
        raise InputError(f"node '{node.name}': the exporter writes no {name} with {texts}") from error


class Evaluation:
    """A model that runs in torch. Weights that lie outside the file are asked of `values` whenever a node reads one."""

    def __init__(self, model: ModelProto, values: Callable[[str], Tensor], exact: bool) -> None:
        self.model, self.values, self.exact = model, values, exact
        self.nodes = list(model.graph.node)
        self.outputs = [output.name for output in model.graph.output]
        self.inline: dict[str, Tensor] = {}
        self.outside: dict[str, torch.dtype] = {}
        for tensor in model.graph.initializer:
            if lies_outside(tensor):
                self.outside[tensor.name] = DTYPES[tensor.data_type]
            else:
                self.inline[tensor.name] = self.typed(tensor_of(tensor))
        self.steps: dict[int, Step] = {}

    def run(self, inputs: Mapping[str, Array | Tensor], wanted: Collection[str] | None = None) -> dict[str, Tensor]:
        """The tensors wanted, by default the graph's outputs. No other outlives its last use."""
        wanted = self.outputs if wanted is None else wanted
        live = self.given(inputs)
        self.advance(live, range(len(self.nodes)), set(wanted))
        return {name: live[name] for name in wanted}

    def given(self, inputs: Mapping[str, Array | Tensor]) -> dict[str, Tensor]:
        return {name: self.typed(torch.as_tensor(np.array(x) if isinstance(x, np.ndarray) else x))
                for name, x in inputs.items()}  # fmt: skip

    def advance(self, live: dict[str, Tensor], nodes: Iterable[int], keep: Collection[str]) -> None:
        """Compute these nodes from what is in `live`, into it. What is not in `keep` leaves it after its last use."""
        nodes = list(nodes)
        steps = [self.step(index) for index in nodes]
        uses = Counter(name for step in steps for name in step.inputs)
        for step in steps:
            outputs = step.apply([self.read(live, name) for name in step.inputs])
            for name in step.inputs:
                uses[name] -= 1
                if not uses[name] and name not in keep:
                    live.pop(name, None)
            for name, tensor in zip(step.outputs, outputs, strict=True):
                if uses[name] or name in keep:
                    live[name] = tensor
            del outputs

    def step(self, index: int) -> Step:
        if index not in self.steps:
            self.steps[index] = Step(self.nodes[index], self.exact)
        return self.steps[index]

    def read(self, live: Mapping[str, Tensor], name: str) -> Tensor | None:
        if not name:
            return None
        if (tensor := live.get(name)) is not None or (tensor := self.inline.get(name)) is not None:
            return tensor
        if name not in self.outside:
            raise InputError(f"graph '{self.model.graph.name}': nothing makes tensor '{name}'")
        value = self.typed(self.values(name))
        return value if self.exact or not value.is_floating_point() else value.to(self.outside[name])

    def typed(self, tensor: Tensor) -> Tensor:
        return tensor.double() if self.exact and tensor.is_floating_point() else tensor


def lies_outside(tensor: TensorProto) -> bool:
    """In a file beside it, or not said yet where: the exporter places weights last."""
    if tensor.data_location == TensorProto.EXTERNAL:
        return True
    empty = not (tensor.raw_data or tensor.float_data or tensor.int64_data or tensor.int32_data or tensor.double_data)
    return empty and 0 not in tensor.dims


def tensor_of(tensor: TensorProto) -> Tensor:
    """An initializer with its values."""
    dtype, array = DTYPES[tensor.data_type], numpy_helper.to_array(tensor)
    if dtype in HALF:  # numpy's own bfloat16 is not torch's
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array)).to(dtype)
