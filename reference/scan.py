"""The two selective scans, plain: each as the recurrence that defines it and as the chunked form that is fast.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t        (MDM Eq. 10, 12; B by Euler's rule as in every Mamba release,
    y_t = C_t h_t + D u_t                                   not by the zero-order hold of Eq. 13)

Mamba-1 (`selective_scan`) has a decay for each channel and state; Mamba-2 (`ssd_scan`) one for each head, which turns
the work inside a chunk into matrix products. Both include what surrounds the recurrence in a block: softplus with
bias, the selection mask, the D skip, the silu(z) gate. State and decay are at least float32.

Letters: B batch, L length, D channels, H heads, P head width, N state, G groups of B and C, Q chunk, c chunks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,  # [B,L,D]
    delta: Tensor,  # [B,L,D]
    A: Tensor,  # [D,N]
    Bm: Tensor,  # [B,L,G,N]
    C: Tensor,  # [B,L,G,N]
    D: Tensor | None = None,  # [D]
    z: Tensor | None = None,  # [B,L,D]
    delta_bias: Tensor | None = None,  # [D]
    mask: Tensor | None = None,  # [B,L]
    chunk_size: int = 64,
    naive: bool = False,
) -> Tensor:
    """Mamba-1 scan -> y [B,L,D]."""
    x, delta, A, Bm, C = _at_least_float32(u, delta, A, Bm, C)
    delta = step_size(delta, delta_bias, mask)  # [B,L,D]
    repeat = x.shape[-1] // Bm.shape[2]  # channels in a group
    decay = torch.exp(delta[..., None] * A)  # [B,L,D,N]
    inflow = (delta * x)[..., None] * Bm.repeat_interleave(repeat, dim=2)  # [B,L,D,N]
    readout = C.repeat_interleave(repeat, dim=2)  # [B,L,D,N]

    state = x.new_zeros(x.shape[0], *A.shape)  # [B,D,N]
    pieces = []
    for start in range(0, x.shape[1], 1 if naive else chunk_size):
        part = slice(start, start + (1 if naive else chunk_size))
        states = _linear_recurrence(decay[:, part], inflow[:, part], state)  # [B,Q,D,N]
        state = states[:, -1]
        pieces.append((states * readout[:, part]).sum(-1))  # [B,Q,D]
    y = torch.cat(pieces, dim=1) if pieces else torch.zeros_like(x)
    return _skip_and_gate(y, x, D, z).to(u.dtype)


def _linear_recurrence(decay: Tensor, inflow: Tensor, state: Tensor) -> Tensor:
    """All states h_t = decay_t h_{t-1} + inflow_t of one chunk, by doubling: log2 Q rounds over whole tensors.

    After the round with stride s, (decay, inflow) at t spans the s tokens up to t. Only products of decays occur,
    never their inverses: dividing by a cumulative product, the shorter way, overflows where decay is strong.
    """
    stride, length = 1, decay.shape[1]
    while stride < length:
        earlier_decay = F.pad(decay[:, :-stride], (0, 0, 0, 0, stride, 0), value=1.0)
        earlier_inflow = F.pad(inflow[:, :-stride], (0, 0, 0, 0, stride, 0))
        inflow = inflow + decay * earlier_inflow
        decay = decay * earlier_decay
        stride *= 2
    return inflow + decay * state[:, None]  # [B,Q,D,N]


def ssd_scan(
    x: Tensor,  # [B,L,H,P]
    dt: Tensor,  # [B,L,H]
    A: Tensor,  # [H]
    Bm: Tensor,  # [B,L,G,N]
    C: Tensor,  # [B,L,G,N]
    D: Tensor | None = None,  # [H]
    z: Tensor | None = None,  # [B,L,H,P]
    dt_bias: Tensor | None = None,  # [H]
    mask: Tensor | None = None,  # [B,L]
    chunk_size: int = 64,
    naive: bool = False,
) -> Tensor:
    """Mamba-2 scan -> y [B,L,H,P]."""
    u, dt, A, Bm, C = _at_least_float32(x, dt, A, Bm, C)
    dt = step_size(dt, dt_bias, mask)  # [B,L,H]
    log_decay = dt * A  # [B,L,H]
    scan = _ssd_recurrence if naive else _ssd_chunked
    y = scan(u * dt[..., None], log_decay, Bm, C, min(chunk_size, max(1, x.shape[1])))
    return _skip_and_gate(y, u, D if D is None else D[:, None], z).to(x.dtype)


def _ssd_recurrence(x: Tensor, log_decay: Tensor, Bm: Tensor, C: Tensor, _chunk: int) -> Tensor:
    """One token after another; the definition. x [B,L,H,P] already carries its step size."""
    batch, length, heads, width = x.shape
    repeat = heads // Bm.shape[2]
    state = x.new_zeros(batch, heads, width, Bm.shape[-1])  # [B,H,P,N]
    y = []
    for t in range(length):
        b = Bm[:, t].repeat_interleave(repeat, dim=1)  # [B,H,N]
        c = C[:, t].repeat_interleave(repeat, dim=1)  # [B,H,N]
        state = state * torch.exp(log_decay[:, t])[..., None, None] + x[:, t, ..., None] * b[:, :, None]
        y.append((state * c[:, :, None]).sum(-1))  # [B,H,P]
    return torch.stack(y, dim=1) if y else torch.zeros_like(x)


def _ssd_chunked(x: Tensor, log_decay: Tensor, Bm: Tensor, C: Tensor, chunk: int) -> Tensor:
    """The same by blocks of Q tokens (Mamba-2 paper, Listing 1): matrix products inside, a recurrence between."""
    batch, length, heads, width = x.shape
    groups, states = Bm.shape[2:]
    spare = -length % chunk
    shape = (batch, (length + spare) // chunk, chunk)  # B, c, Q
    x = F.pad(x, (0, 0, 0, 0, 0, spare)).reshape(*shape, groups, heads // groups, width)  # [B,c,Q,G,h,P]
    log_decay = F.pad(log_decay, (0, 0, 0, spare)).reshape(*shape, groups, heads // groups)  # [B,c,Q,G,h]
    Bm, C = (F.pad(v, (0, 0, 0, 0, 0, spare)).reshape(*shape, groups, states) for v in (Bm, C))  # [B,c,Q,G,N]

    # 1. Decay from token s to token t of the same chunk: exp of the sum over (s, t], 0 where s > t.
    # In float64: float32 sums lose a weak decay behind a strong one. Only their differences go back to x's type.
    total = log_decay.double().movedim(2, -1).cumsum(-1)  # [B,c,G,h,Q]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    within = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).to(x.dtype).exp()

    # 2. Output from the tokens of the same chunk.
    scores = torch.einsum("bctgn,bcsgn->bcgts", C, Bm)  # [B,c,G,Qt,Qs]
    y = torch.einsum("bcghts,bcsghp->bctghp", within * scores[:, :, :, None], x)  # [B,c,Q,G,h,P]
    if shape[1] <= 1:
        return y.reshape(batch, length + spare, heads, width)[:, :length]

    # 3. What each chunk adds to the state, decayed to the chunk's end.
    to_end = (total[..., -1:] - total).to(x.dtype).exp().movedim(-1, 2)  # [B,c,Q,G,h]
    added = torch.einsum("bcsgn,bcsghp->bcghpn", Bm, x * to_end[..., None])  # [B,c,G,h,P,N]

    # 4. The state at the start of each chunk: a recurrence over c chunks instead of L tokens.
    state, starts = torch.zeros_like(added[:, 0]), []
    for index in range(shape[1]):
        starts.append(state)
        state = state * total[:, index, ..., -1].to(x.dtype).exp()[..., None, None] + added[:, index]

    # 5. Output from the state at the chunk's start, decayed to each token.
    from_start = total.to(x.dtype).exp().movedim(-1, 2)  # [B,c,Q,G,h]
    carried = torch.einsum("bctgn,bcghpn->bctghp", C, torch.stack(starts, dim=1))
    y = y + carried * from_start[..., None]
    return y.reshape(batch, length + spare, heads, width)[:, :length]


def step_size(delta: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """softplus(delta + bias), exactly 0 where the selection mask is 0: such a token leaves the state as it was."""
    delta = F.softplus(delta if bias is None else delta + bias.to(delta.dtype))
    return delta if mask is None else delta * mask.to(delta.dtype)[..., None]


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    y = y if D is None else y + D.to(u.dtype) * u
    return y if z is None else y * F.silu(z.to(u.dtype))


def _at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(tensor.to(dtype) for tensor in tensors)
