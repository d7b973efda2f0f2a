"""The two sequence mixers as graph nodes: convolution and scan are one node each, as `plugins/contract.py` has them.

Mirrors `reference/mixer.py`. Letters: B batch, L length, E width, I inner width, R rank of delta, N state, G groups,
H heads, P head width.
"""

from __future__ import annotations

import math

import torch

from mdm.export.graph import Graph, Value
from mdm.export.layers import linear, own_node, rms_norm, short_conv
from mdm.plugins.contract import SELECTIVE_SCAN, SSD_SCAN
from mdm.reference.config import Config

SSD_CHUNK = 64  # of the forms that let one choose: the function body was fastest with it on the CPU


def mixer(g: Graph, config: Config, u: Value, mask: Value | None) -> Value:
    """u [B,L,E] and mask [B,L], both in scan order -> [B,L,E]."""
    return (mamba1 if config.mixer == "mamba1" else mamba2)(g, config, u, mask)


def mamba1(g: Graph, config: Config, u: Value, mask: Value | None) -> Value:
    inner, rank = config.inner, math.ceil(config.width / 16)
    x, z = g.split(linear(g, u, "in_proj", "mixer", bias=False), [inner, inner])  # [B,L,I] each
    x = short_conv(g, x, "conv1d")
    dt, Bm, C = g.split(linear(g, x, "x_proj", "mixer", bias=False), [rank, config.state, config.state])
    delta = linear(g, dt, "dt_proj", "mixer", bias=False)  # [B,L,I]; its bias joins inside the scan
    optional = {"D": g.weight("D", "float32"), "z": z, "delta_bias": g.weight("dt_proj.bias", "float32"), "mask": mask}
    y = own_node(g, SELECTIVE_SCAN, [x, delta, decay(g), g.unsqueeze(Bm, 2), g.unsqueeze(C, 2)], optional, name="scan")
    return linear(g, y, "out_proj", "mixer", bias=False)


def mamba2(g: Graph, config: Config, u: Value, mask: Value | None) -> Value:
    inner, width = config.inner, config.groups * config.state
    mixed = inner + 2 * width  # what the convolution sees: x, B, C
    projected = linear(g, u, "in_proj", "mixer", bias=False)
    z, xBC, dt = g.split(projected, [inner, mixed, inner // config.head])  # [B,L,I], [B,L,I+2GN], [B,L,H]
    x, Bm, C = g.split(short_conv(g, xBC, "conv1d"), [inner, width, width])
    x, z = (g.reshape(v, 0, 0, -1, config.head) for v in (x, z))  # [B,L,H,P]
    Bm, C = (g.reshape(v, 0, 0, config.groups, config.state) for v in (Bm, C))  # [B,L,G,N]
    optional = {"D": g.weight("D", "float32"), "z": z, "dt_bias": g.weight("dt_bias", "float32"), "mask": mask}
    y = own_node(g, SSD_SCAN, [x, dt, decay(g), Bm, C], optional, name="scan", chunk_size=SSD_CHUNK)
    y = rms_norm(g, g.reshape(y, 0, 0, inner), "norm", groups=config.groups)  # the gate is in y already
    return linear(g, y, "out_proj", "mixer", bias=False)


def decay(g: Graph) -> Value:
    """A = -exp(A_log), in float32, once and for all."""
    name = f"{g.path}.A_log"
    checkpoint = g.weights.checkpoint

    def make() -> torch.Tensor:
        return -torch.exp(checkpoint.read(name).float())

    return g.stored_value(g.weights.derive(f"{g.path}.A", checkpoint.expected[name], "float32", make))
