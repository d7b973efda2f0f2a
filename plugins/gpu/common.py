"""What both scans share: the step size, the gate, and the state carried from segment to segment.

A long sequence of few heads or channels is cut into segments that run side by side, in three launches:
    1. each segment's own end state, from a zero state, and the sum of its step sizes (`*_segment_states`)
    2. a recurrence over the segments, which turns end states into start states, in place (`carry_states`)
    3. the scan of each segment from its start state (the same kernel that does a whole sequence in one launch)

`has` says which optional inputs there are: the contract's bits 1 D, 2 z, 4 bias, 8 mask, and 16 for the start states.
The pointer of an absent input may be any valid one; it is never read.
"""

# mypy: ignore-errors
# Triton reads this text, and has types of its own.

import triton
import triton.language as tl

HAS_D = tl.constexpr(1)
HAS_Z = tl.constexpr(2)
HAS_BIAS = tl.constexpr(4)
HAS_MASK = tl.constexpr(8)
HAS_START = tl.constexpr(16)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def extent(has, bit, count):
    """`count`, or 0 where the input is absent: what is loaded below this index is then nothing."""
    return tl.where(has & bit != 0, count, 0)


@triton.jit
def softplus(v):
    """log(1 + e^v) = max(v, 0) + 2 atanh(s), s = e / (2 + e), e = exp(-|v|), atanh by a series good to 5e-9.

    The GPU's fast logarithm of 1 + e would lose four digits where a model's steps lie (0.001).
    """
    e = tl.exp2(tl.abs(v) * -LOG2E)
    s = e / (e + 2.0)
    q = s * s
    p = (((0.2802445927 * q + 0.2799914098) * q + 0.4002169907) * q + 0.6666641313) * q + 2.0
    return tl.maximum(v, 0.0) + p * s


@triton.jit
def silu(v):
    return v / (1.0 + tl.exp2(v * -LOG2E))


@triton.jit
def carry_states(states, step_sums, A, segments, size, per_step, per_A, BLOCK: tl.constexpr):
    """states [B,segments,size] float32: from the end state of each segment alone to the state at its start.

    A segment decays a state by exp(A * its sum of steps). `per_step` and `per_A` consecutive elements of the state
    share one sum of steps and one A: N * P and N * P for Mamba-2, N and 1 for Mamba-1.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    batch = tl.program_id(1).to(tl.int64)
    states += batch * segments * size
    step_sums += batch * segments * (size // per_step)
    A2 = tl.load(A + at // per_A, mask=inside, other=0.0) * LOG2E
    state = tl.zeros([BLOCK], tl.float32)
    for _ in range(segments):
        added = tl.load(states + at, mask=inside, other=0.0)
        steps = tl.load(step_sums + at // per_step, mask=inside, other=0.0)
        tl.store(states + at, state, mask=inside)
        state = state * tl.exp2(A2 * steps) + added
        states += size
        step_sums += size // per_step
