"""Mamba-1's scan (MambaSelectiveScan): one program for each (batch, block of channels), token after token.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        y_t = C_t h_t + D u_t,  times silu(z_t)

The state of W = 32 channels stays in registers: a lane has a channel, a warp K of its N states. So step sizes are
computed once for all states, and sums over the states taken once for Q tokens. Tensors are contiguous, as in the
contract; state, decay and softplus are float32. The work that binds it is one exp for each token, channel and state.

Letters: L length, R channels of a group, G groups of B and C, N state, Q tokens read at once, W channels of a block,
S warps, K = N / S states of a warp.
"""

# mypy: ignore-errors
# Triton reads this text, and has types of its own.

import triton
import triton.language as tl

from mdm.plugins.gpu.common import HAS_BIAS, HAS_D, HAS_MASK, HAS_START, HAS_Z, LOG2E, extent, silu, softplus


@triton.jit
def token_of(tile, rows, i):
    """Row i of a tile [Q,K,S,W]. The rest is -0.0, which a sum may drop: no instruction is left of this."""
    return tl.sum(tl.where(rows == i, tile, -0.0), 0)  # [K,S,W]


@triton.jit
def load_states(of, token, end, row, n):
    """B or C of some tokens, read a loop early and carried, so that bits become floats before the threads share them:
    four times fewer conversions."""
    at = token[:, None, None] * row + n[None, :, :]
    return tl.load(of + at, mask=(token < end)[:, None, None], other=0.0).to(tl.float32)  # [Q,K,S]


@triton.jit
def load_steps(delta, at, bias, mask, token, end, inside, has):
    """Step sizes, 0 behind the segment's end."""
    now = token < end
    raw = tl.load(delta + at, mask=now[:, None] & inside[None, :], other=0.0).to(tl.float32)  # [Q,W]
    factor = tl.load(mask + token, mask=token < extent(has, HAS_MASK, end), other=1.0)  # [Q]
    return tl.where(now[:, None], softplus(raw + bias[None, :]) * factor[:, None], 0.0)  # [Q,W]


@triton.jit
def selective_scan(
    u, delta, A, Bm, C, D, z, delta_bias, mask, states, y,
    L, R, G, segment, has,
    N: tl.constexpr, S: tl.constexpr, W: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """y of one segment of `segment` tokens, from its start state or from zero."""
    K: tl.constexpr = N // S
    blocks = tl.cdiv(R, W)
    group = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * W + tl.arange(0, W)  # in the group
    inside = column < R
    channel = group * R + column
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * segment
    end = tl.minimum(first + segment, L)

    u += batch * L * G * R
    delta += batch * L * G * R
    z += batch * L * G * R
    y += batch * L * G * R
    mask += batch * L
    Bm += (batch * L * G + group) * N
    C += (batch * L * G + group) * N
    states += (batch * tl.num_programs(1) + tl.program_id(1)) * (G * R) * N
    bias = tl.load(delta_bias + channel, mask=column < extent(has, HAS_BIAS, R), other=0.0)
    skip = tl.load(D + channel, mask=column < extent(has, HAS_D, R), other=0.0)

    n = tl.arange(0, K)[:, None] + K * tl.arange(0, S)[None, :]  # [K,S]
    of_state = channel[None, None, :] * N + n[:, :, None]
    rate = tl.load(A + of_state, mask=inside[None, None, :], other=0.0) * LOG2E  # [K,S,W]
    started = (column < extent(has, HAS_START, R))[None, None, :]
    state = tl.load(states + of_state, mask=started, other=0.0)  # [K,S,W]
    # A sum of one: without it the loop carries the state as it was loaded, and each token moves it between threads.
    state = tl.sum(state[None, :, :, :], 0)

    rows = tl.arange(0, Q)
    row = rows[:, None, None, None]
    next_B = load_states(Bm, first + rows, end, G * N, n)
    next_C = load_states(C, first + rows, end, G * N, n)
    # The stages are named here because, unasked, Triton reads ahead only for matrix products.
    for start in tl.range(first, end, Q, num_stages=2):
        token = start + rows
        at = token[:, None] * (G * R) + channel[None, :]
        there = (token < end)[:, None] & inside[None, :]
        X = tl.load(u + at, mask=there, other=0.0).to(tl.float32)  # [Q,W]
        gated = (token < extent(has, HAS_Z, end))[:, None] & inside[None, :]
        gate = tl.load(z + at, mask=gated, other=0.0).to(tl.float32)  # [Q,W]
        step = load_steps(delta, at, bias, mask, token, end, inside, has)  # [Q,W]
        B, Ct = next_B, next_C
        next_B = load_states(Bm, token + Q, end, G * N, n)
        next_C = load_states(C, token + Q, end, G * N, n)

        decay = tl.exp2(step[:, None, None, :] * rate[None, :, :, :])  # [Q,K,S,W]
        inflow = (step * X)[:, None, None, :] * B[:, :, :, None]  # [Q,K,S,W]
        readout = tl.broadcast_to(Ct[:, :, :, None], [Q, K, S, W])
        read = tl.zeros([Q, K, S, W], tl.float32)
        for i in tl.static_range(Q):
            state = token_of(decay, row, i) * state + token_of(inflow, row, i)
            read = tl.where(row == i, (state * token_of(readout, row, i))[None, :, :, :], read)
        out = tl.sum(tl.sum(read, 1), 1) + skip[None, :] * X  # [Q,W]
        if has & HAS_Z != 0:
            out *= silu(gate)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=there)


@triton.jit
def selective_segment_states(
    u, delta, A, Bm, delta_bias, mask, states, step_sums,
    L, R, G, segment, has,
    N: tl.constexpr, S: tl.constexpr, W: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """What one segment adds to the state, [B,segments,D,N], and its sums of steps, [B,segments,D]."""
    K: tl.constexpr = N // S
    blocks = tl.cdiv(R, W)
    group = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * W + tl.arange(0, W)  # in the group
    inside = column < R
    channel = group * R + column
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * segment
    end = tl.minimum(first + segment, L)

    u += batch * L * G * R
    delta += batch * L * G * R
    mask += batch * L
    Bm += (batch * L * G + group) * N
    states += (batch * tl.num_programs(1) + tl.program_id(1)) * (G * R) * N
    step_sums += (batch * tl.num_programs(1) + tl.program_id(1)) * (G * R)
    bias = tl.load(delta_bias + channel, mask=column < extent(has, HAS_BIAS, R), other=0.0)

    n = tl.arange(0, K)[:, None] + K * tl.arange(0, S)[None, :]  # [K,S]
    of_state = channel[None, None, :] * N + n[:, :, None]
    rate = tl.load(A + of_state, mask=inside[None, None, :], other=0.0) * LOG2E  # [K,S,W]
    state = tl.zeros([K, S, W], tl.float32)
    sum_of_steps = tl.zeros([W], tl.float32)

    rows = tl.arange(0, Q)
    row = rows[:, None, None, None]
    next_B = load_states(Bm, first + rows, end, G * N, n)
    for start in tl.range(first, end, Q, num_stages=2):
        token = start + rows
        at = token[:, None] * (G * R) + channel[None, :]
        X = tl.load(u + at, mask=(token < end)[:, None] & inside[None, :], other=0.0).to(tl.float32)  # [Q,W]
        step = load_steps(delta, at, bias, mask, token, end, inside, has)  # [Q,W]
        B = next_B
        next_B = load_states(Bm, token + Q, end, G * N, n)

        decay = tl.exp2(step[:, None, None, :] * rate[None, :, :, :])  # [Q,K,S,W]
        inflow = (step * X)[:, None, None, :] * B[:, :, :, None]  # [Q,K,S,W]
        for i in tl.static_range(Q):
            state = token_of(decay, row, i) * state + token_of(inflow, row, i)
        sum_of_steps += tl.sum(step, 0)

    tl.store(states + of_state, state, mask=inside[None, None, :])
    tl.store(step_sums + channel, sum_of_steps, mask=inside)
