"""The small parts of the network as graph nodes: each mirrors a torch module or function of `reference/`.

A part casts what it is given to the type its role has at its place (`precision.py`), and its result has that type.
Letters: B batch, L tokens, E width, K taps.
"""

from __future__ import annotations

import math

import numpy as np

from mdm.export.graph import Graph, Value

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


def causal_conv(g: Graph, x: Value, path: str, channels: int, taps: int) -> Value:
    """Depthwise convolution over time on [B,L,I]; token t sees t-K+1 .. t.

    Conv wants channels first. Its two transposes are half the price of K slices, products and sums without them (7.4
    against 15 ms, silu included, for 1064 x 4352 on two cores).
    """
    with g.scope(path):
        dtype = g.dtype("mixer")
        weight, bias = g.weight("weight", dtype), g.weight("bias", dtype)
        turned = g.transpose(g.cast(x, dtype), 0, 2, 1)
        y = g.op("Conv", turned, weight, bias, group=channels, pads=[taps - 1, 0])
        return g.transpose(y, 0, 2, 1)
