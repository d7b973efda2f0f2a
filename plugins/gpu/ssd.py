"""Mamba-2's scan (MambaSsdScan): one program for each (batch, head, block of the head's width), chunk after chunk.

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T        y_t = C_t S_t + D x_t,  times silu(z_t)

In chunks of Q tokens this is four matrix products (Mamba-2 paper, Listing 1). The state stays in registers, and
nothing in between goes to device memory. All tensors are contiguous, as in the contract. State, decay and softplus
are float32; products of halves add up in float32; float32 inputs are multiplied as such (no tf32).

The state lies in blocks of K of its N rows: all operands of one product are in registers at once, and those of a
float32 product over 128 rows do not fit.

Letters: L length, H heads, P head width, N state, G groups of B and C, Q tokens of a chunk, W width of a block of P,
K states of a block of N.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton reads this text: it has types of its own, and knows no (*a, b).

import triton
import triton.language as tl

from mdm.plugins.gpu.common import HAS_BIAS, HAS_D, HAS_MASK, HAS_START, HAS_Z, LOG2E, extent, silu, softplus


@triton.jit
def chunk_steps(dt, mask, token, end, H, bias, has):
    """Step sizes of one chunk, 0 behind the segment's end."""
    raw = tl.load(dt + token * H, mask=token < end, other=0.0).to(tl.float32)  # [Q]
    factor = tl.load(mask + token, mask=token < extent(has, HAS_MASK, end), other=1.0)  # [Q]
    return tl.where(token < end, softplus(raw + bias) * factor, 0.0)


@triton.jit
def sum_and_last(sum_a, last_a, sum_b, last_b):
    return sum_a + sum_b, last_b


@triton.jit
def ssd_scan(
    x, dt, A, Bm, C, D, z, dt_bias, mask, states, y,
    L, H, P, G, segment, has,
    N: tl.constexpr, K: tl.constexpr, W: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """y of one segment of `segment` tokens, from its start state or from zero."""
    blocks = P // W
    head, column = tl.program_id(0) // blocks, tl.program_id(0) % blocks * W
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * segment
    end = tl.minimum(first + segment, L)
    group = head // (H // G)

    x += batch * L * H * P + head * P + column
    y += batch * L * H * P + head * P + column
    z += batch * L * H * P + head * P + column
    dt += batch * L * H + head
    mask += batch * L
    Bm += batch * L * G * N + group * N
    C += batch * L * G * N + group * N
    states += ((batch * tl.num_programs(1) + tl.program_id(1)) * H + head) * N * P + column
    bias = tl.load(dt_bias + head, mask=has & HAS_BIAS != 0, other=0.0)
    skip = tl.load(D + head, mask=has & HAS_D != 0, other=0.0)
    rate = tl.load(A + head).to(tl.float64) * LOG2E

    rows, columns, block_rows = tl.arange(0, Q), tl.arange(0, W), tl.arange(0, K)
    state = ()
    for k in tl.static_range(0, N, K):
        start_at = states + (k + block_rows)[:, None] * P + columns[None, :]
        there = (k + block_rows)[:, None] < extent(has, HAS_START, N)
        state = state + (tl.load(start_at, mask=there, other=0.0),)  # [K,W]

    # The stages are named here because, unasked, Triton reads ahead only what goes into products: not z.
    for start in tl.range(first, end, Q, num_stages=2):
        token = start + rows
        inside = (token < end)[:, None]
        at = token[:, None] * (H * P) + columns[None, :]
        X = tl.load(x + at, mask=inside, other=0.0)  # [Q,W]
        gate = tl.load(z + at, mask=token[:, None] < extent(has, HAS_Z, end), other=0.0)  # [Q,W]
        B, Ct = (), ()
        for k in tl.static_range(0, N, K):
            grouped = token[:, None] * (G * N) + (k + block_rows)[None, :]
            B = B + (tl.load(Bm + grouped, mask=inside, other=0.0),)  # [Q,K]
            Ct = Ct + (tl.load(C + grouped, mask=inside, other=0.0),)  # [Q,K]

        # Decay from token s to token t of the chunk: exp of the log decays' sum over (s, t], as a difference of
        # running sums. Float32 sums lose a weak decay behind a strong one, so they are taken in float64 and split into
        # two floats, whose differences are good to float32. Cost: a float64 sum of Q values, and two additions more
        # for each of the Q * Q pairs.
        # The steps pass through the sum untouched: otherwise the compiler loads them and takes softplus once more, in
        # the layout of a product's columns, for each of them sixteen times.
        step = chunk_steps(dt, mask, token, end, H, bias, has)  # [Q]
        log_decay = step.to(tl.float64) * rate
        total, step = tl.associative_scan((log_decay, step), 0, sum_and_last)  # [Q]
        whole = tl.sum(log_decay, 0)
        high = total.to(tl.float32)
        low = (total - high).to(tl.float32)
        to_end = tl.exp2((whole - total).to(tl.float32)) * step  # [Q]

        scores = tl.zeros([Q, Q], tl.float32)
        out = tl.zeros([Q, W], tl.float32)
        for k in tl.static_range(N // K):
            scores = tl.dot(Ct[k], tl.trans(B[k]), scores, input_precision="ieee")  # [Qt,Qs]
        for k in tl.static_range(N // K):
            out = tl.dot(Ct[k], state[k].to(X.dtype), out, input_precision="ieee")  # [Q,W]
        # The scores times 0: so the pairs are computed where the scores lie. Else each chunk moves Q * Q floats
        # through shared memory.
        between = (scores * 0.0 + high[:, None] - high[None, :]) + (low[:, None] - low[None, :])  # [Qt,Qs]
        between = tl.where(rows[:, None] >= rows[None, :], between, float("-inf"))
        weights = (scores * tl.exp2(between) * step[None, :]).to(X.dtype)
        out = tl.dot(weights, X, out * tl.exp2(high)[:, None], input_precision="ieee")

        ending = (X * to_end[:, None]).to(X.dtype)  # [Q,W]
        decay = tl.exp2(whole.to(tl.float32))
        ended = ()
        for k in tl.static_range(N // K):
            ended = ended + (tl.dot(tl.trans(B[k]), ending, state[k] * decay, input_precision="ieee"),)
        state = ended

        out += skip * X
        if has & HAS_Z != 0:
            out *= silu(gate.to(tl.float32))
        tl.store(y + at, out.to(X.dtype), mask=inside)


@triton.jit
def ssd_segment_states(
    x, dt, A, Bm, dt_bias, mask, states, step_sums,
    L, H, P, G, segment, has,
    N: tl.constexpr, K: tl.constexpr, W: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """What one segment adds to the state, [B,segments,H,N,P], and its sum of steps, [B,segments,H].

    A program has one block of the state's rows.
    """
    blocks = P // W
    block = tl.program_id(0) % (N // K) * K
    column = tl.program_id(0) // (N // K) % blocks * W
    head = tl.program_id(0) // (N // K) // blocks
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * segment
    end = tl.minimum(first + segment, L)
    group = head // (H // G)
    segment_head = (batch * tl.num_programs(1) + tl.program_id(1)) * H + head

    x += batch * L * H * P + head * P + column
    dt += batch * L * H + head
    mask += batch * L
    Bm += batch * L * G * N + group * N + block
    states += (segment_head * N + block) * P + column
    bias = tl.load(dt_bias + head, mask=has & HAS_BIAS != 0, other=0.0)
    rate = tl.load(A + head).to(tl.float64) * LOG2E

    rows, columns, block_rows = tl.arange(0, Q), tl.arange(0, W), tl.arange(0, K)
    state = tl.zeros([K, W], tl.float32)
    sum_of_steps = 0.0
    for start in tl.range(first, end, Q, num_stages=2):
        token = start + rows
        inside = (token < end)[:, None]
        X = tl.load(x + token[:, None] * (H * P) + columns[None, :], mask=inside, other=0.0)  # [Q,W]
        B = tl.load(Bm + token[:, None] * (G * N) + block_rows[None, :], mask=inside, other=0.0)  # [Q,K]
        step = chunk_steps(dt, mask, token, end, H, bias, has)  # [Q]
        log_decay = step.to(tl.float64) * rate
        whole = tl.sum(log_decay, 0)
        to_end = tl.exp2((whole - tl.cumsum(log_decay, 0)).to(tl.float32)) * step  # [Q]
        ending = (X * to_end[:, None]).to(X.dtype)  # [Q,W]
        state = tl.dot(tl.trans(B), ending, state * tl.exp2(whole.to(tl.float32)), input_precision="ieee")
        sum_of_steps += tl.sum(step, 0)

    tl.store(states + block_rows[:, None] * P + columns[None, :], state)
    tl.store(step_sums + segment_head, sum_of_steps)
