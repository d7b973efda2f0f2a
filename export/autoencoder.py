"""The image autoencoder outside a latent DiM as graph nodes; mirrors `reference/autoencoder.py`.

The torch module is walked as it stands: each kind of part has one function here, and a node's name, like its weights',
is the module's path. Batch, height and width stay open, so one file serves every picture whose sides are multiples of
the autoencoder's factor; only the attention, and only at its end, has to ask for a shape.

Letters: B batch, C channels, G groups of a norm, H x W picture or level, h x w latent, N = h*w, z latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from mdm.export.graph import Graph, Value
from mdm.export.layers import silu
from mdm.reference.autoencoder import Attention, Autoencoder, Middle, ResBlock

LATENT, PICTURE = ("height", "width"), ("picture_height", "picture_width")


def encode_image(g: Graph, model: Autoencoder, scale: float) -> None:
    """Pictures in [-1,1] -> the diffusion's latents: the posterior's mean times `scale`."""
    picture = g.input("picture", "float32", ["batch", model.shape.picture, *PICTURE])
    with g.scope("autoencoder"):
        moments = part(g, model, "quant_conv", part(g, model, "encoder", picture))  # [B,2z,h,w]
        mean = g.cast(g.slice(moments, 1, 0, model.shape.latent), "float32")
        z = mean * scale
    g.output("z", z, ["batch", model.shape.latent, *LATENT])


def decode_image(g: Graph, model: Autoencoder, scale: float) -> None:
    """The picture is not clamped: what leaves [-1,1] is for the caller to see."""
    z = g.input("z", "float32", ["batch", model.shape.latent, *LATENT])
    with g.scope("autoencoder"):
        shown = part(g, model, "decoder", part(g, model, "post_quant_conv", z / scale))
        picture = g.cast(shown, "float32")
    g.output("picture", picture, ["batch", model.shape.picture, *PICTURE])


def part(g: Graph, parent: nn.Module, path: str, x: Value) -> Value:
    """What the module at `path` below `parent` makes of x."""
    module = parent.get_submodule(path)
    with g.scope(path):
        return PARTS[type(module)](g, module, x)


def weight(g: Graph, name: str, tensor: Tensor, dtype: str) -> Value:
    """A parameter of the module at this path, in the shape given."""
    values = tensor.detach()
    return g.stored_value(g.weights.derive(f"{g.path}.{name}", tuple(values.shape), dtype, lambda: values))


def chain(g: Graph, module: nn.Sequential, x: Value) -> Value:
    for name, _ in module.named_children():
        x = part(g, module, name, x)
    return x


def middle(g: Graph, module: Middle, x: Value) -> Value:
    for path in ("resnets.0", "attentions.0", "resnets.1"):
        x = part(g, module, path, x)
    return x


def res_block(g: Graph, module: ResBlock, x: Value) -> Value:  # [B,before,H,W] -> [B,C,H,W]
    dtype = g.dtype("vae")
    y = part(g, module, "conv1", silu(part(g, module, "norm1", x)))
    y = part(g, module, "conv2", silu(part(g, module, "norm2", y)))
    # Casts, as everywhere, for `fp32_layers`: it may keep single parts of a block.
    return g.cast(part(g, module, "conv_shortcut", x), dtype) + g.cast(y, dtype)


def attention(g: Graph, module: Attention, x: Value) -> Value:  # [B,C,h,w] -> [B,C,h,w]
    dtype, width = g.dtype("vae"), module.to_q.in_features
    normed = part(g, module, "group_norm", x)
    tokens = g.transpose(g.reshape(normed, 0, 0, -1), 0, 2, 1)  # [B,N,C]
    q, k, v = (g.cast(part(g, module, name, tokens), dtype) for name in ("to_q", "to_k", "to_v"))
    # q is scaled, not the scores: their sums over 512 channels could leave float16's range.
    scores = g.op("MatMul", q * width**-0.5, g.transpose(k, 0, 2, 1))  # [B,N,N]
    shares = g.op("Softmax", g.cast(scores, g.dtype("norm")), axis=-1)
    mixed = part(g, module, "to_out.0", g.op("MatMul", g.cast(shares, dtype), v))  # [B,N,C]
    image = g.op("Reshape", g.transpose(mixed, 0, 2, 1), g.op("Shape", x, dtype="int64"))  # [B,C,h,w]
    return g.cast(x, dtype) + g.cast(image, dtype)


def group_norm(g: Graph, module: nn.GroupNorm, x: Value) -> Value:
    """An InstanceNormalization over groups: GroupNormalization came with opset 18 and changed its meaning with 21.

    Both reshapes keep W and leave the rest to -1, which needs no shape.
    """
    dtype, groups = g.dtype("norm"), module.num_groups
    ones, zeros = (g.constant(np.full(groups, fill), dtype) for fill in (1.0, 0.0))
    parts = g.reshape(g.cast(x, dtype), 0, groups, -1, 0)  # [B,G,C/G*H,W]
    normed = g.op("InstanceNormalization", parts, ones, zeros, epsilon=module.eps)
    image = g.reshape(normed, 0, module.num_channels, -1, 0)  # [B,C,H,W]
    scale, shift = (weight(g, name, getattr(module, name)[:, None, None], dtype) for name in ("weight", "bias"))
    return image * scale + shift


def conv(g: Graph, module: nn.Conv2d, x: Value) -> Value:
    dtype, stride, pad = g.dtype("vae"), module.stride[0], int(module.padding[0])
    # A halving one has no padding of its own: the row below and the column at the right are the ZeroPad2d before it.
    pads = [pad] * 4 if stride == 1 else [0, 0, 1, 1]
    operands = [weight(g, name, getattr(module, name), dtype) for name in ("weight", "bias")]
    return g.op("Conv", g.cast(x, dtype), *operands, pads=pads, strides=[stride, stride])


def linear(g: Graph, module: nn.Linear, x: Value) -> Value:
    dtype = g.dtype("vae")
    turned = g.transpose(weight(g, "weight", module.weight, dtype), 1, 0)  # [in,out]
    return g.op("MatMul", g.cast(x, dtype), turned) + weight(g, "bias", module.bias, dtype)


def double(g: Graph, module: nn.Upsample, x: Value) -> Value:  # [B,C,H,W] -> [B,C,2H,2W]
    no_region, scales = Value(g, "", "float32"), g.constant(np.array([1.0, 1.0, 2.0, 2.0]), "float32")
    # y[i] = x[i // 2], in the spelling that ONNX Runtime and TensorRT both take.
    index: dict[str, Any] = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    return g.op("Resize", x, no_region, scales, mode="nearest", **index)


PARTS: dict[type[nn.Module], Callable[[Graph, Any, Value], Value]] = {
    nn.Sequential: chain,
    Middle: middle,
    ResBlock: res_block,
    Attention: attention,
    nn.GroupNorm: group_norm,
    nn.Conv2d: conv,
    nn.Linear: linear,
    nn.Upsample: double,
    nn.SiLU: lambda g, module, x: silu(x),
    nn.ZeroPad2d: lambda g, module, x: x,  # see `conv`
    nn.Identity: lambda g, module, x: x,
}
