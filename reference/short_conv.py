"""The short convolution of a Mamba block: what its sequence goes through before the scan.

    y_t = silu(bias + sum over k < K of weight[:,k] x_{t-K+1+k})        x before the first token is 0

Depthwise and causal: each channel for itself, token t sees t-K+1 .. t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_conv(
    x: Tensor,  # [B,L,D]
    weight: Tensor,  # [D,K]
    bias: Tensor | None = None,  # [D]
) -> Tensor:
    """-> y [B,L,D], computed in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, length, taps = weight.to(dtype), x.shape[1], weight.shape[1]
    seen = F.pad(x.to(dtype), (0, 0, taps - 1, 0))  # [B,K-1+L,D]
    total = torch.zeros_like(x, dtype=dtype) if bias is None else bias.to(dtype).expand_as(x)
    for k in range(taps):
        total = total + weight[:, k] * seen[:, k : k + length]
    return F.silu(total).to(x.dtype)
