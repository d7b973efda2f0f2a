"""The two sequence mixers of a block, Mamba-1 (DiM) and Mamba-2 (MDM), on the scans of `scan.py`.

Parameter names are those of the mamba-ssm package, so that its checkpoints and DiM's load without renaming.
Letters: B batch, L length, E width, I inner width (expand * E), K taps, R rank of delta, N state, G groups, H heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.reference.config import Config
from mdm.reference.scan import selective_scan, ssd_scan


class CausalConv(nn.Conv1d):
    """Depthwise convolution over time, channels last; token t sees t-K+1 .. t.

    Run as a 2-d convolution of height 1: on a CPU its channels-last kernel needs a tenth of the forward time of
    nn.Conv1d with transposes (1.6 against 11.7 ms for 64 x 93 x 320) and half of the backward time.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__(channels, channels, taps, groups=channels)

    def forward(self, x: Tensor) -> Tensor:  # [B,L,I]
        padded = F.pad(x, (0, 0, self.kernel_size[0] - 1, 0)).mT[:, :, None]  # [B,I,1,K-1+L]
        return F.conv2d(padded, self.weight[:, :, None], self.bias, groups=self.groups).squeeze(2).mT


class Mamba1(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        inner, rank = config.inner, math.ceil(config.width / 16)
        self.split = [rank, config.state, config.state]
        self.in_proj = nn.Linear(config.width, 2 * inner, bias=False)
        self.conv1d = CausalConv(inner, config.conv)
        self.x_proj = nn.Linear(inner, sum(self.split), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, config.state + 1).float().log().repeat(inner, 1))  # [I,N]
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, config.width, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(initial_step_bias(inner))

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:  # [B,L,E] -> [B,L,E]
        x, z = self.in_proj(u).chunk(2, dim=-1)  # [B,L,I] each
        x = F.silu(self.conv1d(x))
        dt, Bm, C = self.x_proj(x).split(self.split, dim=-1)  # [B,L,R], [B,L,N], [B,L,N]
        delta = F.linear(dt, self.dt_proj.weight)  # [B,L,I]; its bias joins inside the scan
        y = selective_scan(
            x, delta, -torch.exp(self.A_log), Bm[:, :, None], C[:, :, None],
            D=self.D, z=z, delta_bias=self.dt_proj.bias, mask=mask,
        )  # fmt: skip
        return self.out_proj(y)


class GroupedRMSNorm(nn.Module):
    """RMS norm over each of G equal parts of the width."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:  # [B,L,I]
        parts = x.unflatten(-1, (self.groups, -1))  # [B,L,G,I/G]
        return F.rms_norm(parts, parts.shape[-1:], eps=1e-5).flatten(-2) * self.weight


class Mamba2(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head, self.groups, self.state = config.head, config.groups, config.state
        inner, heads = config.inner, config.inner // config.head
        mixed = inner + 2 * config.groups * config.state  # what the convolution sees: x, B, C
        self.split = [inner, mixed, heads]
        self.in_proj = nn.Linear(config.width, sum(self.split), bias=False)
        self.conv1d = CausalConv(mixed, config.conv)
        self.dt_bias = nn.Parameter(initial_step_bias(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GroupedRMSNorm(inner, config.groups)
        self.out_proj = nn.Linear(inner, config.width, bias=False)

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:  # [B,L,E] -> [B,L,E]
        z, xBC, dt = self.in_proj(u).split(self.split, dim=-1)  # [B,L,I], [B,L,I+2GN], [B,L,H]
        width = self.groups * self.state
        x, Bm, C = F.silu(self.conv1d(xBC)).split([z.shape[-1], width, width], dim=-1)
        y = ssd_scan(
            x.unflatten(-1, (-1, self.head)),  # [B,L,H,P]
            dt,
            -torch.exp(self.A_log),
            Bm.unflatten(-1, (self.groups, self.state)),  # [B,L,G,N]
            C.unflatten(-1, (self.groups, self.state)),  # [B,L,G,N]
            D=self.D, z=z.unflatten(-1, (-1, self.head)), dt_bias=self.dt_bias, mask=mask, chunk_size=128,
        )  # [B,L,H,P]  # fmt: skip
        return self.out_proj(self.norm(y.flatten(-2)))  # the gate is in y: norm(y * silu(z))


MIXERS: dict[str, type[Mamba1] | type[Mamba2]] = {"mamba1": Mamba1, "mamba2": Mamba2}


def initial_step_bias(channels: int) -> Tensor:
    """Bias whose softplus is spread log-uniformly over step sizes 0.001 to 0.1."""
    step = torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))  # inverse of softplus
