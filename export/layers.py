"""The small parts of the network as graph nodes: each mirrors a torch module or function of `reference/`.

A part casts what it is given to the type its role has at its place (`precision.py`), and its result has that type.
Letters: B batch, L tokens, E width, I inner width, K taps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mdm.export.graph import Graph, Value
from mdm.plugins.contract import DOMAIN, SHORT_CONV, VERSION, Operator

RMS_OPSET = 23  # from here on ONNX has RMSNormalization


def linear(g: Graph, x: Value, path: str, role: str, bias: bool = True, rows: tuple[int, int] | None = None) -> Value:
    """nn.Linear; `rows`: only these of its outputs."""
    with g.scope(path):
        dtype = g.dtype(role)
        # As the checkpoint has it, [out,in]; ONNX Runtime and TensorRT turn it once, when they load the file.
        weight = g.transpose(g.weight("weight", dtype, rows), 1, 0)
        y = g.op("MatMul", g.cast(x, dtype), weight)
        return y + g.weight("bias", dtype, rows) if bias else y


def silu(x: Value) -> Value:
    with x.graph.scope("silu"):
        return x * x.graph.op("Sigmoid", x)


def rms_norm(g: Graph, x: Value, path: str, eps: float = 1e-5, groups: int = 1) -> Value:
    """nn.RMSNorm over the last axis, or over each of G equal parts of it."""
    with g.scope(path):
        dtype = g.dtype("norm")
        x = g.cast(x, dtype)
        scale = g.weight("weight", dtype)
        if groups > 1:
            parts = _normalized(g, g.reshape(x, 0, 0, groups, -1), eps)  # [B,L,G,I/G]
            return g.reshape(parts, 0, 0, -1) * scale
        if g.opset >= RMS_OPSET:
            return g.op("RMSNormalization", x, scale, axis=-1, epsilon=eps)
        return _normalized(g, x, eps) * scale


def _normalized(g: Graph, x: Value, eps: float) -> Value:
    """x / sqrt(mean(x^2) + eps), spelled as ONNX Runtime's fusion to one kernel expects it."""
    mean = g.op("ReduceMean", g.op("Pow", x, 2.0), g.ints(-1), keepdims=1)
    return x / g.op("Sqrt", mean + eps)


def embedding(g: Graph, ids: Value, path: str, role: str) -> Value:
    with g.scope(path):
        return g.weight("weight", g.dtype(role))[ids]


def sinusoid(g: Graph, t: Value, width: int) -> Value:
    """[cos(t f_j) | sin(t f_j)], f_j = 10000^(-j / (width/2)): t [B] -> [B,width]."""
    half = width // 2
    frequency = np.exp(np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half))
    angle = g.unsqueeze(t, 1) * g.constant(frequency[None], t.dtype)
    return g.concat(-1, g.op("Cos", angle), g.op("Sin", angle))


def grid_conv(g: Graph, image: Value, path: str) -> Value:
    """The depthwise 3x3 convolution on a channels-last grid [B,h,w,E]."""
    with g.scope(path):
        dtype = g.dtype("ends")
        weight, bias = g.weight("weight", dtype), g.weight("bias", dtype)
        width = g.weights.checkpoint.expected[f"{g.path}.bias"][0]
        turned = g.transpose(g.cast(image, dtype), 0, 3, 1, 2)
        return g.transpose(g.op("Conv", turned, weight, bias, group=width, pads=[1, 1, 1, 1]), 0, 2, 3, 1)


def short_conv(g: Graph, x: Value, path: str) -> Value:
    """Depthwise causal convolution and silu on [B,L,I], one node."""
    with g.scope(path):
        stored = g.weights.parameter(f"{g.path}.weight", "float32")
        channels, _, taps = stored.shape
        weight = g.stored_value(replace(stored, shape=(channels, taps)))  # the checkpoint's [I,1,K]
        return own_node(g, SHORT_CONV, [x, weight], {"bias": g.weight("bias", "float32")}, name="conv")


def own_node(
    g: Graph,
    operator: Operator,
    required: Sequence[Value],
    optional: Mapping[str, Value | None],
    name: str,
    **attributes: int,
) -> Value:
    """A node of one of our operators: absent inputs are left out, `has` says which are there, and all activations have
    one type."""
    present = {key: value for key, value in optional.items() if value is not None}
    values = dict(zip((spec.name for spec in operator.required), required, strict=True)) | present
    dtype, there = g.dtype("mixer"), [spec for spec in operator.inputs if spec.name in values]
    inputs = [g.cast(values[spec.name], dtype) if spec.activation else values[spec.name] for spec in there]
    # The plugin's attributes lead TensorRT to it; ONNX Runtime goes by the domain.
    written: dict[str, Any] = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION), **attributes}
    return g.op(operator.name, *inputs, domain=DOMAIN, name=name, has=operator.has_of(present), **written)
