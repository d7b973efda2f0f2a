"""The whole numbers that a graph computes from shapes: what decides the sizes of tensors behind a Reshape or a Range.

ONNX's own shape inference follows additions and products, but neither quotients nor remainders, and a scan's body cuts
its tokens into chunks by both. Only numbers are computed here, at most `MOST` in a tensor, and never a tensor's values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper

MOST = 64
WHOLE = (TensorProto.INT64, TensorProto.INT32)
Shape = tuple[int, ...]
# Numbers of any size, so that a stranger's products do not wrap around.
Numbers = np.ndarray[Any, np.dtype[np.object_]]


def fold(nodes: Iterable[NodeProto], shapes: Mapping[str, Shape], numbers: dict[str, Numbers]) -> bool:
    """Add to `numbers` what these nodes compute from them and from the shapes -> whether anything was added."""
    before = len(numbers)
    for node in nodes:
        rule = RULES.get(node.op_type)
        if rule is None or node.domain or not node.output or node.output[0] in numbers:
            continue
        try:
            found = rule(node, {a.name: a for a in node.attribute}, shapes, numbers)
        except (KeyError, IndexError, ValueError, TypeError, ArithmeticError):  # not known, or not to be computed
            continue
        if found.size <= MOST and all(abs(int(n)) < 2**63 for n in found.flat):
            numbers[node.output[0]] = found
    return len(numbers) > before


def of_tensor(tensor: TensorProto) -> Numbers | None:
    """The numbers of a tensor in the file itself, if they are whole and few."""
    size = 1
    for dim in tensor.dims:
        size *= dim
    if tensor.data_type not in WHOLE or tensor.external_data or not 0 <= size <= MOST:
        return None
    try:
        return numpy_helper.to_array(tensor).astype(object)
    except (ValueError, TypeError):  # fewer bytes than its dimensions ask for
        return None


def as_tensor(name: str, numbers: Numbers) -> TensorProto:
    return numpy_helper.from_array(numbers.astype(np.int64), name)


Attributes = Mapping[str, AttributeProto]
Rule = Callable[[NodeProto, Attributes, Mapping[str, Shape], Mapping[str, Numbers]], Numbers]


def _shape(node: NodeProto, given: Attributes, shapes: Mapping[str, Shape], numbers: Mapping[str, Numbers]) -> Numbers:
    shape = shapes[node.input[0]]
    start = given["start"].i if "start" in given else 0
    end = given["end"].i if "end" in given else len(shape)
    return np.array(shape[start:end], object)


def _constant(
    node: NodeProto, given: Attributes, shapes: Mapping[str, Shape], numbers: Mapping[str, Numbers]
) -> Numbers:
    if "value_ints" in given:
        return np.array(list(given["value_ints"].ints[: MOST + 1]), object)
    if "value_int" in given:
        return np.array(given["value_int"].i, object)
    found = of_tensor(given["value"].t)
    if found is None:
        raise ValueError
    return found


def _of_inputs(compute: Callable[..., Any]) -> Rule:
    """A rule that asks for the numbers of every input."""

    def rule(
        node: NodeProto, given: Attributes, shapes: Mapping[str, Shape], numbers: Mapping[str, Numbers]
    ) -> Numbers:
        return np.asarray(compute(given, *(numbers[name] for name in node.input)), object)

    return rule


def _quotient(given: Attributes, a: Numbers, b: Numbers) -> Numbers:
    """Sizes and counts: where a sign would matter for the rounding, nothing is known."""
    if min(a.min(), b.min()) < 0:
        raise ValueError
    return np.asarray(a // b, object)


def _remainder(given: Attributes, a: Numbers, b: Numbers) -> Numbers:
    if "fmod" in given and given["fmod"].i:
        raise ValueError
    return np.asarray(a % b, object)


def _slice(given: Attributes, data: Numbers, *where: Numbers) -> Numbers:
    (start,), (end,) = where[0], where[1]
    step = where[3][0] if len(where) > 3 else 1
    if data.ndim != 1 or step != 1:
        raise ValueError
    return data[int(start) : int(end)]


def _gather(given: Attributes, data: Numbers, at: Numbers) -> Numbers:
    return np.asarray(data[at.astype(np.int64)], object) if data.ndim == 1 else _refuse()


def _unsqueeze(given: Attributes, data: Numbers, axes: Numbers) -> Numbers:
    return np.expand_dims(data, tuple(int(axis) for axis in axes))


def _squeeze(given: Attributes, data: Numbers, *axes: Numbers) -> Numbers:
    return np.squeeze(data, tuple(int(axis) for axis in axes[0]) if axes else None)


def _cast(given: Attributes, data: Numbers) -> Numbers:
    return data if given["to"].i in WHOLE else _refuse()


def _refuse() -> Numbers:
    raise ValueError


RULES: dict[str, Rule] = {
    "Shape": _shape,
    "Constant": _constant,
    "Add": _of_inputs(lambda given, a, b: a + b),
    "Sub": _of_inputs(lambda given, a, b: a - b),
    "Mul": _of_inputs(lambda given, a, b: a * b),
    "Neg": _of_inputs(lambda given, a: -a),
    "Div": _of_inputs(_quotient),
    "Mod": _of_inputs(_remainder),
    "Concat": _of_inputs(lambda given, *parts: np.concatenate(parts)),
    "Slice": _of_inputs(_slice),
    "Gather": _of_inputs(_gather),
    "Unsqueeze": _of_inputs(_unsqueeze),
    "Squeeze": _of_inputs(_squeeze),
    "Cast": _of_inputs(_cast),
    "Identity": _of_inputs(lambda given, data: data),
}
