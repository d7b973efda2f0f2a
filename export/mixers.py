"""The two sequence mixers as graph nodes: each scan is one node, as `plugins/contract.py` has it.

Mirrors `reference/mixer.py`. Letters: B batch, L length, E width, I inner width, R rank of delta, N state, G groups,
H heads, P head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from mdm.export.graph import Graph, Value
from mdm.export.layers import causal_conv, linear, rms_norm, silu
from mdm.plugins.contract import DOMAIN, SELECTIVE_SCAN, SSD_SCAN, VERSION, Operator
from mdm.reference.config import Config

SSD_CHUNK = 64  # of the forms that let one choose: the function body was fastest with it on the CPU


def mixer(g: Graph, config: Config, u: Value, mask: Value | None) -> Value:
    """u [B,L,E] and mask [B,L], both in scan order -> [B,L,E]."""
    return (mamba1 if config.mixer == "mamba1" else mamba2)(g, config, u, mask)


def mamba1(g: Graph, config: Config, u: Value, mask: Value | None) -> Value:
    inner, rank = config.inner, math.ceil(config.width / 16)
    x, z = g.split(linear(g, u, "in_proj", "mixer", bias=False), [inner, inner])  # [B,L,I] each
    x = silu(causal_conv(g, x, "conv1d", inner, config.conv))
    dt, Bm, C = g.split(linear(g, x, "x_proj", "mixer", bias=False), [rank, config.state, config.state])
    delta = linear(g, dt, "dt_proj", "mixer", bias=False)  # [B,L,I]; its bias joins inside the scan
    optional = {"D": g.weight("D", "float32"), "z": z, "delta_bias": g.weight("dt_proj.bias", "float32"), "mask": mask}
    y = scan(g, SELECTIVE_SCAN, [x, delta, decay(g), g.unsqueeze(Bm, 2), g.unsqueeze(C, 2)], optional)
    return linear(g, y, "out_proj", "mixer", bias=False)


def mamba2(g: Graph, config: Config, u: Value, mask: Value | None) -> Value:
    inner, width = config.inner, config.groups * config.state
    mixed = inner + 2 * width  # what the convolution sees: x, B, C
    projected = linear(g, u, "in_proj", "mixer", bias=False)
    z, xBC, dt = g.split(projected, [inner, mixed, inner // config.head])  # [B,L,I], [B,L,I+2GN], [B,L,H]
    x, Bm, C = g.split(silu(causal_conv(g, xBC, "conv1d", mixed, config.conv)), [inner, width, width])
    x, z = (g.reshape(v, 0, 0, -1, config.head) for v in (x, z))  # [B,L,H,P]
    Bm, C = (g.reshape(v, 0, 0, config.groups, config.state) for v in (Bm, C))  # [B,L,G,N]
    optional = {"D": g.weight("D", "float32"), "z": z, "dt_bias": g.weight("dt_bias", "float32"), "mask": mask}
    y = scan(g, SSD_SCAN, [x, dt, decay(g), Bm, C], optional, chunk_size=SSD_CHUNK)
    y = rms_norm(g, g.reshape(y, 0, 0, inner), "norm", groups=config.groups)  # the gate is in y already
    return linear(g, y, "out_proj", "mixer", bias=False)


def decay(g: Graph) -> Value:
    """A = -exp(A_log), in float32, once and for all."""
    name = f"{g.path}.A_log"
    checkpoint = g.weights.checkpoint

    def make() -> torch.Tensor:
        return -torch.exp(checkpoint.read(name).float())

    return g.stored_value(g.weights.derive(f"{g.path}.A", checkpoint.expected[name], "float32", make))


def scan(
    g: Graph, operator: Operator, required: list[Value], optional: dict[str, Value | None], **attributes: int
) -> Value:
    """The scan's node: absent inputs are left out, `has` says which are there, and all activations have one type."""
    present = {name: value for name, value in optional.items() if value is not None}
    values = dict(zip((spec.name for spec in operator.required), required, strict=True)) | present
    dtype, there = g.dtype("mixer"), [spec for spec in operator.inputs if spec.name in values]
    inputs = [g.cast(values[spec.name], dtype) if spec.activation else values[spec.name] for spec in there]
    # The plugin's attributes lead TensorRT to it; ONNX Runtime goes by the domain.
    written: dict[str, Any] = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION), **attributes}
    return g.op(
        operator.name, *inputs, domain=DOMAIN, name="scan",
        has=operator.has_of(present), **written,
    )  # fmt: skip
