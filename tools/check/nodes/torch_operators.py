"""Every operator that the exporter writes, in torch: for each a factory, from a node's attributes to its function.

A function takes the node's inputs in order, None for one that is absent. It computes in the type it is given, so in
float64 it is the definition and in float32 what a plain implementation makes of it. An attribute, or a value of one,
that the exporter does not write is refused: nothing is computed by half.

Letters: B batch, C channels, L length.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdm.plugins.contract import DOMAIN, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN
from mdm.reference.scan import selective_scan, ssd_scan
from mdm.reference.short_conv import short_conv

Function = Callable[..., Tensor | Sequence[Tensor]]
FEW_ROWS = 32  # up to here a product is summed in plain order, see `matmul`
LANES = 4
SCANNED_AT_ONCE = 1 << 22  # states of Mamba-1 by tokens: its plain form holds several tensors of that size


def plain(function: Function) -> Callable[[], Function]:
    """An operator without attributes."""
    return lambda: function


def ints(values: Tensor | None) -> list[int]:
    return [] if values is None else [int(v) for v in values.tolist()]


def power(x: Tensor, exponent: Tensor) -> Tensor:
    return x.pow(float(exponent)) if exponent.numel() == 1 else x.pow(exponent)  # squares are exact that way


def sigmoid(x: Tensor) -> Tensor:
    """In float32 exact to 4e-8 of one on both sides, as ONNX Runtime's is: torch's has more digits where x is negative,
    and silu behind it would show them."""
    return torch.sigmoid(x) if x.dtype == torch.float64 else 1 - torch.sigmoid(-x)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """In float32 a few rows are summed in plain order: torch would sum them in many partial sums side by side, which is
    twice as exact as the products of engines, and no measure of float32's arithmetic."""
    rows = x.numel() // max(1, x.shape[-1])
    if x.dtype == torch.float64 or y.ndim != 2 or rows > FEW_ROWS:
        return x @ y
    flat = x.reshape(rows, -1)  # [M,K]
    total = flat.new_zeros(rows, y.shape[1])
    for k in range(y.shape[0]):
        total += flat[:, k, None] * y[k]
    return total.reshape(*x.shape[:-1], y.shape[1])


def total(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    """A sum. In float32 by four lanes, each in plain order: torch adds pairs of pairs, which loses nearly nothing."""
    if x.dtype != torch.float32:
        return x.sum(dim, keepdim)
    last = tuple(range(x.ndim - len(dim), x.ndim))
    flat = x.movedim(dim, last).flatten(last[0])  # [...,K]
    lanes = F.pad(flat, (0, -flat.shape[-1] % LANES))
    lanes = lanes.reshape(*lanes.shape[:-1], -1, LANES)
    sums = torch.zeros_like(lanes[..., 0, :])
    for k in range(lanes.shape[-2]):
        sums += lanes[..., k, :]
    y = sums.sum(-1)
    return y[(..., *[None] * len(dim))].movedim(tuple(range(y.ndim, x.ndim)), dim) if keepdim else y


def mean(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return total(x, dim, keepdim) / math.prod(x.shape[axis] for axis in dim)


def folded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Function]:
    return lambda: lambda *values: reduce(function, values)


def reduction(function: Callable[..., Tensor]) -> Callable[..., Function]:
    def factory(axes: Sequence[int] = (), keepdims: int = 1, noop_with_empty_axes: int = 0) -> Function:
        refuse(bool(noop_with_empty_axes))

        def apply(x: Tensor, given: Tensor | None = None) -> Tensor:
            return function(x, tuple(axis % x.ndim for axis in ints(given) or axes or range(x.ndim)), bool(keepdims))

        return apply

    return factory


def concat(axis: int) -> Function:
    return lambda *values: torch.cat(values, axis)


def split(axis: int = 0) -> Function:
    return lambda x, sizes: x.split(ints(sizes), axis)


def slice_() -> Function:
    def apply(x: Tensor, start: Tensor, end: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
        index = [slice(None)] * x.ndim
        starts, ends = ints(start), ints(end)
        for first, last, axis, step in zip(
            starts, ends, ints(axes) or range(len(starts)), ints(steps) or [1] * len(starts), strict=True
        ):
            refuse(step < 1)
            index[axis] = slice(first, last, step)
        return x[tuple(index)]

    return apply


def gather(axis: int = 0) -> Function:
    def apply(x: Tensor, index: Tensor) -> Tensor:
        place = axis % x.ndim
        wrapped = torch.where(index < 0, index + x.shape[place], index)
        taken = x.index_select(place, wrapped.reshape(-1))
        return taken.reshape(*x.shape[:place], *index.shape, *x.shape[place + 1 :])

    return apply


def reshape(allowzero: int = 0) -> Function:
    def apply(x: Tensor, shape: Tensor) -> Tensor:
        sizes = ints(shape)
        if not allowzero:
            sizes = [x.shape[place] if size == 0 else size for place, size in enumerate(sizes)]
        return x.reshape(sizes)

    return apply


def transpose(perm: Sequence[int] = ()) -> Function:
    return lambda x: x.permute(tuple(perm) or tuple(reversed(range(x.ndim))))


def unsqueeze() -> Function:
    def apply(x: Tensor, axes: Tensor) -> Tensor:
        rank = x.ndim + axes.numel()
        for axis in sorted(axis % rank for axis in ints(axes)):
            x = x.unsqueeze(axis)
        return x

    return apply


def squeeze() -> Function:
    return lambda x, axes=None: x.squeeze() if axes is None else x.squeeze(ints(axes))


def expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(ints(shape))))


def shape_of(start: int = 0, end: int | None = None) -> Function:
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def clip() -> Function:
    return lambda x, least=None, most=None: x.clamp(least, most)


def argmax(axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Function:
    refuse(bool(select_last_index))
    return lambda x: x.argmax(axis, bool(keepdims))


def pad(mode: str = "constant") -> Function:
    refuse(mode != "constant")

    def apply(x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
        before, after = torch.tensor(ints(pads)).reshape(2, -1).tolist()
        widths = [0] * (2 * x.ndim)  # torch begins with the last axis
        for axis, first, last in zip(ints(axes) or range(x.ndim), before, after, strict=True):
            place = 2 * (x.ndim - 1 - axis % x.ndim)
            widths[place : place + 2] = [first, last]
        return F.pad(x, widths, value=0.0 if value is None else float(value))

    return apply


def conv(
    group: int = 1, pads: Sequence[int] = (), strides: Sequence[int] = (), kernel_shape: Sequence[int] = ()
) -> Function:
    def apply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        axes = x.ndim - 2
        steps = tuple(strides) or (1,) * axes
        if any(pads):
            begin, end = pads[:axes], pads[axes:]
            x = F.pad(x, [n for axis in reversed(range(axes)) for n in (begin[axis], end[axis])])
        if group == x.shape[1] == weight.shape[0]:
            y = depthwise(x, weight, steps)
            return y if bias is None else y + bias.view(-1, *[1] * axes)
        return (F.conv1d if axes == 1 else F.conv2d)(x, weight, bias, steps, groups=group)

    return apply


def depthwise(x: Tensor, weight: Tensor, steps: Sequence[int]) -> Tensor:
    """Tap by tap: torch goes through the groups one by one in float64, a hundred times slower."""
    taps = weight.shape[2:]
    counts = [(x.shape[2 + a] - taps[a]) // steps[a] + 1 for a in range(len(taps))]
    y = x.new_zeros(*x.shape[:2], *counts)
    for at in itertools.product(*[range(n) for n in taps]):
        starts = zip(at, counts, steps, strict=True)
        seen: Any = [slice(first, first + (count - 1) * step + 1, step) for first, count, step in starts]
        tap: Any = (slice(None), 0, *at)
        y += x[(..., *seen)] * weight[tap].view(-1, *[1] * len(taps))
    return y


def average_pool(kernel_shape: Sequence[int], strides: Sequence[int] = ()) -> Function:
    return lambda x: F.avg_pool2d(x, list(kernel_shape), list(strides) or [1, 1])


def softmax(axis: int = -1) -> Function:
    return lambda x: x.softmax(axis)


def rms_normalization(axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Function:
    refuse(axis != -1)
    return lambda x, scale: x / (mean(x.square(), (x.ndim - 1,), True) + epsilon).sqrt() * scale


def instance_normalization(epsilon: float = 1e-5) -> Function:
    return lambda x, scale, bias: F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def resize(coordinate_transformation_mode: str = "", nearest_mode: str = "", mode: str = "nearest") -> Function:
    """y[i] = x[floor(i / scale)] along every axis."""
    refuse((mode, coordinate_transformation_mode, nearest_mode) != ("nearest", "asymmetric", "floor"))

    def apply(x: Tensor, region: Tensor | None, scales: Tensor) -> Tensor:
        for axis, scale in enumerate(scales.tolist()):
            if scale != 1:
                count = int(x.shape[axis] * scale)
                x = x.index_select(axis, (torch.arange(count) / scale).floor().long())
        return x

    return apply


def ssd(has: int = 0, chunk_size: int = 64, plugin_namespace: str = "", plugin_version: str = "") -> Function:
    names = [spec.name for spec in SSD_SCAN.present(has)]
    return lambda *values: ssd_scan(**dict(zip(names, values, strict=True)), chunk_size=chunk_size)


def selective(has: int = 0, plugin_namespace: str = "", plugin_version: str = "") -> Function:
    present = SELECTIVE_SCAN.present(has)

    def apply(*values: Tensor) -> Tensor:
        inputs: dict[str, Any] = {spec.name: value for spec, value in zip(present, values, strict=True)}
        batch, length, channels = inputs["u"].shape
        states, groups = inputs["A"].shape[1], inputs["Bm"].shape[2]
        at_once = SCANNED_AT_ONCE // max(1, batch * length * states)
        if groups > 1 or channels <= at_once:
            return selective_scan(**inputs)
        parts = []  # channels of one group know nothing of each other
        for start in range(0, channels, max(1, at_once)):
            part = dict(inputs)
            for spec in present:
                if "D" in spec.dims:
                    part[spec.name] = part[spec.name].narrow(
                        spec.dims.index("D"), start, min(max(1, at_once), channels - start)
                    )
            parts.append(selective_scan(**part))
        return torch.cat(parts, -1)  # [B,L,D]

    return apply


def silu_conv(has: int = 0, plugin_namespace: str = "", plugin_version: str = "") -> Function:
    names = [spec.name for spec in SHORT_CONV.present(has)]
    return lambda *values: short_conv(**dict(zip(names, values, strict=True)))


def refuse(unknown: bool) -> None:
    """Where the exporter writes only one kind."""
    if unknown:
        raise ValueError


OURS: dict[str, Callable[..., Function]] = {
    SSD_SCAN.name: ssd, SELECTIVE_SCAN.name: selective, SHORT_CONV.name: silu_conv,
}  # fmt: skip
STANDARD: dict[str, Callable[..., Function]] = {
    "Add": plain(torch.add), "Sub": plain(torch.sub), "Mul": plain(torch.mul), "Div": plain(torch.div),
    "MatMul": plain(matmul), "Pow": plain(power), "Sqrt": plain(torch.sqrt), "Exp": plain(torch.exp),
    "Sigmoid": plain(sigmoid), "Sin": plain(torch.sin), "Cos": plain(torch.cos), "Sinh": plain(torch.sinh),
    "Floor": plain(torch.floor), "Less": plain(torch.lt), "Equal": plain(torch.eq),
    "And": plain(torch.logical_and), "Or": plain(torch.logical_or), "Where": plain(torch.where),
    "Identity": plain(lambda x: x), "Expand": plain(expand), "Range": plain(range_),
    "Max": folded(torch.maximum), "Min": folded(torch.minimum),
    "ReduceMean": reduction(mean), "ReduceSum": reduction(total), "ReduceMax": reduction(torch.amax),
    "Concat": concat, "Split": split, "Slice": slice_, "Gather": gather, "Reshape": reshape,
    "Transpose": transpose, "Unsqueeze": unsqueeze, "Squeeze": squeeze, "Shape": shape_of, "Clip": clip,
    "ArgMax": argmax, "Pad": pad, "Conv": conv, "AveragePool": average_pool, "Softmax": softmax,
    "RMSNormalization": rms_normalization, "InstanceNormalization": instance_normalization, "Resize": resize,
}  # fmt: skip
# By domain and name.
OPERATORS = {(DOMAIN, name): factory for name, factory in OURS.items()} | {
    ("", name): factory for name, factory in STANDARD.items()
}
