"""The short convolution (MambaShortConv): one program for each sample, block of T tokens and block of W channels.

    y_t = silu(bias + sum over k of weight_k x_{t-K+1+k})        x is 0 before the first token

Each tap is a load of its own, a row further; all but the first find their lines in the multiprocessor's cache. Tensors
are contiguous, channels last; sums are float32.

Letters: L length, D channels, K taps, T tokens and W channels of a block.
"""

# mypy: ignore-errors
# Triton reads this text, and has types of its own.

import triton
import triton.language as tl

from mdm.plugins.gpu.common import extent, silu

HAS_BIAS = tl.constexpr(1)  # in this operator's `has`


@triton.jit
def short_conv(
    x, weight, bias, y,
    L, D, has,
    K: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * W + tl.arange(0, W)
    inside = column < D
    token = tl.program_id(1) * T + tl.arange(0, T)
    batch = tl.program_id(2).to(tl.int64)
    x += batch * L * D
    y += batch * L * D
    start = tl.load(bias + column, mask=column < extent(has, HAS_BIAS, D), other=0.0)  # [W]
    total = tl.zeros([T, W], tl.float32) + start[None, :]
    for k in tl.static_range(K):
        row = token - (K - 1 - k)
        there = ((row >= 0) & (row < L))[:, None] & inside[None, :]
        seen = tl.load(x + row[:, None] * D + column[None, :], mask=there, other=0.0).to(tl.float32)  # [T,W]
        total += tl.load(weight + column * K + k, mask=inside, other=0.0)[None, :] * seen
    out = (token < L)[:, None] & inside[None, :]
    tl.store(y + token[:, None] * D + column[None, :], silu(total).to(y.dtype.element_ty), mask=out)
