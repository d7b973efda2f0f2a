"""Score entropy and selection (MDM Eq. 4-8, 14, Theorems 1-3), as this project reads them.

Taken literally the loss is wrong: with Theorem 1's ratio and Theorem 2's softmax, eps_hat = 0 is an exact minimiser
and the true noise is not, so L_se would fight the noise loss. The mend that keeps its meaning averages Theorem 1's
exponent over the forward noise,  E |z_t - a y|^2 = a^2 |z_0 - y|^2 + s^2 d,  and divides it by d (it overflows
otherwise). Over candidates Y, the clean latent and less noised states of the same token ("y in z_{0:t-1}"):

    data's ratio    r(y) = softmax over Y of -a^2 |y - z_0|^2 / (2 s^2 d)
    model's ratio   s(y) = the same with the estimate x0 in place of z_0
    se = sum_y s - r log s + K(r),  K(r) = r (log r - 1)        zero where x0 = z_0, never negative

Letters: B batch, L tokens, d latent width, Y candidates, a = alpha, s = sigma.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def score_entropy(candidates: Tensor, x0: Tensor, z0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """se of each token (Eq. 4, mended): candidates [Y,B,L,d], x0 and z0 [B,L,d], alpha and sigma [B,1,1] -> [B,L]."""
    log_r = _log_ratio(candidates, z0, alpha, sigma)  # [Y,B,L]
    log_s = _log_ratio(candidates, x0, alpha, sigma)
    r = log_r.exp()
    # Both ratios sum to 1, so the sums of s and of -r cancel and se is the Kullback-Leibler divergence of s from r.
    return (r * (log_r - log_s)).sum(0).clamp(min=0)


def _log_ratio(candidates: Tensor, centre: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    distance = (candidates - centre).square().mean(-1)  # [Y,B,L], already divided by d
    return torch.log_softmax(-(alpha**2 / (2 * sigma**2)).squeeze(-1) * distance, dim=0)


def theorem1_log_ratio(z: Tensor, z0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """log p(z0)/p(z) exactly as Theorem 1 (Eq. 5) prints it -> [B,L]. Documented, tested, and not used.

    With f(z, y) = this at z0 := y as the logits of both ratios, the data's side does not depend on the network at all
    unless z0 is replaced by its estimate; replacing it makes |z - a x0|^2 = s^2 |eps_hat|^2, which is smallest at
    eps_hat = 0, whatever the true noise was.
    """
    return (z.square() - (z - alpha * z0).square() / sigma**2).sum(-1) / 2


def select(
    x0: Tensor,  # [B,L,d], the estimate of this evaluation
    x0_before: Tensor,  # [B,L,d], the estimate of the evaluation before
    alpha: Tensor,  # broadcasts with [B,L,1]
    sigma: Tensor,
    given: Tensor,  # [B,L] bool
    keep: float,
) -> Tensor:
    """The mask [B,L] for the next evaluation: 1 where a token moves the scan's state (Theorem 3: se about 0).

    At a sampling step z_0 is unknown, so the estimate before stands for it and Y holds the two estimates: se is small
    where the token has settled. The j = ceil(keep * generated) smallest are kept; given tokens always are. With two
    candidates se = l tanh(l / 2), l = a^2 |x0 - x0_before|^2 / (2 s^2 d), which ranks as l does; se itself would be
    lost to rounding where a token has settled.
    """
    if keep == 1:
        return torch.ones_like(x0[..., 0])
    unrest = (alpha / sigma).squeeze(-1) ** 2 * (x0 - x0_before).square().mean(-1)  # [B,L]
    rank = unrest.masked_fill(given, -1).argsort(dim=-1, stable=True).argsort(dim=-1)  # given tokens come first
    count = given.sum(-1)  # [B]
    j = count + torch.ceil(keep * (x0.shape[1] - count).double() - 1e-9)  # 0.3 * 50 is 15.000001 in float32
    return (rank < j[:, None]).to(x0.dtype)


def candidates_of(z0: Tensor, noise: Tensor, alphas: Tensor, sigmas: Tensor) -> Tensor:
    """The clean latent and less noised states of the same tokens: alphas, sigmas [Y-1,B,1,1] -> [Y,B,L,d]."""
    return torch.cat([z0[None], alphas * z0 + sigmas * noise])


def expected_distance(z0: Tensor, y: Tensor, alpha: float, sigma: float) -> Tensor:
    """E |z_t - a y|^2 over the forward noise: the identity that the mend rests on."""
    return alpha**2 * (z0 - y).square().sum(-1) + sigma**2 * math.prod(z0.shape[-1:])
