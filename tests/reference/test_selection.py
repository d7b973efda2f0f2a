"""Score entropy and selection: the mended L_se has its minimum at the true noise, and selection keeps what it says.

se is the Kullback-Leibler divergence of two softmaxes whose logits are linear in the estimate x0, so it is convex in
x0. That makes the gradient tests exact: (x0 - z0) . grad >= se holds at every point, not only near the minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdm.reference.multimodal import MDM
from mdm.reference.schedule import CosineSchedule
from mdm.reference.selection import candidates_of, expected_distance, score_entropy, select, theorem1_log_ratio

Figure = Callable[[str, float, float], None]
B, L, D = 3, 5, 12


def problem(seed: int, a: float = 0.6) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """candidates [4,B,L,d], z0, noise, alpha, sigma in float64; less noised states as training draws them."""
    g = torch.Generator().manual_seed(seed)
    z0, noise = torch.randn(2, B, L, D, generator=g, dtype=torch.float64)
    alpha = torch.full((B, 1, 1), a, dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    later = torch.rand(3, B, 1, 1, generator=g, dtype=torch.float64) * sigma
    return candidates_of(z0, noise, (1 - later**2).sqrt(), later), z0, noise, alpha, sigma


def by_the_definition(candidates: Tensor, x0: Tensor, z0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """sum_y s - r log s + K(r), K(r) = r (log r - 1), word by word."""

    def weights(centre: Tensor) -> Tensor:
        exponent = -(alpha**2) * (candidates - centre).square().sum(-1, keepdim=True) / (2 * sigma**2 * D)
        return exponent.exp().squeeze(-1)

    r, s = (w / w.sum(0) for w in (weights(z0), weights(x0)))
    value = (s - r * s.log() + r * (r.log() - 1)).sum(0)
    underflow = torch.minimum(weights(z0), weights(x0)).amin(0) < 1e-290  # written so; what is tested does not
    return value.masked_fill(underflow, torch.nan)


def estimate(z0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    return (alpha * z0 + sigma * noise - sigma * eps) / alpha


def test_it_is_zero_at_the_true_noise_and_above_zero_without_noise(figure: Figure) -> None:
    candidates, z0, noise, alpha, sigma = problem(0)
    assert score_entropy(candidates, z0, z0, alpha, sigma).eq(0).all()
    at_truth = score_entropy(candidates, estimate(z0, noise, alpha, sigma, noise), z0, alpha, sigma)
    figure("L_se at the true noise", float(at_truth.max()), 1e-15)
    silent = score_entropy(candidates, estimate(z0, noise, alpha, sigma, torch.zeros_like(noise)), z0, alpha, sigma)
    assert float(silent.min()) > 0
    assert float(silent.mean()) > 0.01, f"L_se at eps = 0: {float(silent.mean()):.2g}"


@given(seed=st.integers(0, 10**6), a=st.floats(0.05, 0.999), spread=st.floats(0, 5))
@settings(deadline=None, max_examples=60)
def test_it_is_the_formula_and_never_negative(seed: int, a: float, spread: float) -> None:
    candidates, z0, noise, alpha, sigma = problem(seed, a)
    x0 = z0 + spread * noise
    se = score_entropy(candidates, x0, z0, alpha, sigma)
    assert (se >= 0).all()
    expected = by_the_definition(candidates, x0, z0, alpha, sigma)
    sound = expected.isfinite()
    torch.testing.assert_close(se[sound], expected[sound], rtol=1e-8, atol=1e-12)


def test_rounding_near_the_truth_makes_nothing_negative() -> None:
    candidates, z0, noise, alpha, sigma = (tensor.float() for tensor in problem(9))
    for away in (1e-7, 1e-6, 1e-5, 1e-4):
        assert (score_entropy(candidates, z0 + away * noise, z0, alpha, sigma) >= 0).all()


@given(seed=st.integers(0, 10**6), a=st.floats(0.05, 0.995), away=st.floats(1e-2, 3))
@settings(deadline=None, max_examples=60)
def test_its_gradient_points_at_the_true_noise(seed: int, a: float, away: float) -> None:
    candidates, z0, noise, alpha, sigma = problem(seed, a)
    start = noise + away * torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    eps = start.clone().requires_grad_()
    se = score_entropy(candidates, estimate(z0, noise, alpha, sigma, eps), z0, alpha, sigma)
    (grad,) = torch.autograd.grad(se.sum(), eps)
    toward = (grad * (eps - noise)).sum(-1).detach()  # convexity: at least se
    assert (toward >= se.detach() * (1 - 1e-9) - 1e-13).all()
    assert (toward[se > 1e-9] > 0).all()


def test_descent_comes_nearer_to_the_true_noise(figure: Figure) -> None:
    candidates, z0, noise, alpha, sigma = problem(1)
    eps = (noise + torch.randn(noise.shape, generator=torch.Generator().manual_seed(2)).double()).requires_grad_()
    distances, losses = [], []
    for _ in range(200):
        loss = score_entropy(candidates, estimate(z0, noise, alpha, sigma, eps), z0, alpha, sigma).sum()
        (grad,) = torch.autograd.grad(loss, eps)
        distances.append(float((eps - noise).norm().detach()))
        losses.append(float(loss.detach()))
        eps = (eps - 50 * grad).detach().requires_grad_()
    assert all(later < before for before, later in pairwise(distances))
    figure("L_se after 200 gradient steps, share of the start", losses[-1] / losses[0], 0.05)


def test_the_literal_ratio_prefers_no_noise_which_is_why_it_is_not_used(figure: Figure) -> None:
    _, z0, noise, alpha, sigma = problem(3)
    z = alpha * z0 + sigma * noise
    other = torch.randn(noise.shape, generator=torch.Generator().manual_seed(4)).double()
    worst = 0.0
    for eps in (noise, torch.zeros_like(noise), other):
        ratio = theorem1_log_ratio(z, estimate(z0, noise, alpha, sigma, eps), alpha, sigma)
        closed = (z.square() - eps.square()).sum(-1) / 2  # does not contain the true noise at all
        worst = max(worst, float((ratio - closed).abs().max()))
    figure("Theorem 1 = (|z|^2 - |eps_hat|^2) / 2", worst, 1e-12)


def test_expected_distance_by_monte_carlo(figure: Figure) -> None:
    g = torch.Generator().manual_seed(5)
    z0, y = torch.randn(2, D, generator=g).double()
    alpha, sigma, count = 0.6, 0.8, 400_000
    drawn = (alpha * z0 + sigma * torch.randn(count, D, generator=g).double() - alpha * y).square().sum(-1)
    error = abs(float(drawn.mean() - expected_distance(z0, y, alpha, sigma)))
    figure("E|z_t - a y|^2, in standard errors", error / float(drawn.std() / math.sqrt(count)), 4)


@pytest.mark.parametrize("t", [1e-4, 1e-3, 0.5, 1 - 1e-4])
@pytest.mark.parametrize("shift", [0.25, 3.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_nothing_overflows_at_the_ends_of_a_schedule(t: float, shift: float, scale: float) -> None:
    schedule, time = CosineSchedule(shift), torch.tensor([[[t]]], dtype=torch.float64)
    alpha, sigma = schedule.alpha(time).float(), schedule.sigma(time).float()
    z0, noise = torch.randn(2, 1, L, D, generator=torch.Generator().manual_seed(6))
    candidates = candidates_of(z0, noise, torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 0.1))
    x0 = (z0 + scale * noise).requires_grad_()
    se = score_entropy(candidates, x0, z0, alpha, sigma)
    se.sum().backward()
    assert x0.grad is not None
    assert se.isfinite().all()
    assert x0.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------- select


def chosen(moved: Tensor, given: Tensor, keep: float) -> Tensor:
    """The mask after estimates that moved by `moved` [B,L] since the evaluation before."""
    before = torch.randn(*moved.shape, D, generator=torch.Generator().manual_seed(7))
    level = torch.full((1, 1, 1), 0.5**0.5)
    return select(before + moved[..., None], before, level, level, given, keep)


@pytest.mark.parametrize("keep", [Fraction(k, 20) for k in range(1, 20)])
def test_exactly_j_tokens_are_kept_for_every_length(keep: Fraction) -> None:
    wrong = []
    for count in [*range(1, 200), 289, 340, 360, 380, 1000, 3840]:
        moved = torch.rand(1, count, generator=torch.Generator().manual_seed(count))
        found = int(chosen(moved, torch.zeros(1, count, dtype=torch.bool), float(keep)).sum())
        if found != math.ceil(keep * count):
            wrong.append((count, found, math.ceil(keep * count)))
    assert not wrong, f"keep {float(keep)}: (tokens, kept, expected) {wrong[:5]}"


@given(data=st.data(), count=st.integers(1, 30), keep=st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.9, 0.999]))
@settings(deadline=None, max_examples=80)
def test_given_tokens_and_the_most_settled_are_kept(data: st.DataObject, count: int, keep: float) -> None:
    flags = data.draw(st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=1, max_size=3))
    given = torch.tensor(flags)
    order = torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in range(len(flags))])
    moved = 0.1 + order.float() / count  # all different
    mask = chosen(moved, given, keep).bool()
    for row, known, way in zip(mask, given, moved, strict=True):
        assert row[known].all()
        made = ~known
        kept = math.ceil(Fraction(str(keep)) * int(made.sum()))
        assert sorted(way[made & row].tolist()) == sorted(way[made].tolist())[:kept]


def test_keep_1_is_all_ones_and_ties_go_to_the_first_tokens() -> None:
    none = torch.zeros(2, 10, dtype=torch.bool)
    assert torch.equal(chosen(torch.rand(2, 10), none, 1.0), torch.ones(2, 10))
    still = chosen(torch.zeros(2, 10), none, 0.3)
    assert torch.equal(still, torch.tensor([1.0] * 3 + [0.0] * 7).expand(2, 10))
    assert torch.equal(chosen(torch.rand(2, 10), ~none, 0.1), torch.ones(2, 10))
    last = torch.arange(10).expand(2, -1) >= 8  # given: before all others, also where everything has settled
    assert torch.equal(chosen(torch.zeros(2, 10), last, 0.1), torch.tensor([1.0] + [0.0] * 7 + [1.0] * 2).expand(2, 10))


def test_each_token_is_judged_at_its_own_noise_level() -> None:
    before, moved = torch.zeros(1, 2, D), torch.tensor([[0.2, 0.3]])
    alpha = torch.tensor([0.9, 0.1])[None, :, None]  # the first moved less, but where little noise is left
    mask = select(before + moved[..., None], before, alpha, (1 - alpha**2).sqrt(), torch.zeros(1, 2).bool(), 0.5)
    assert mask.tolist() == [[0.0, 1.0]]


# -------------------------------------------------------------------------------------- the whole model


def inputs(text_tokens: int, pictures: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(8)
    tokens = text_tokens + 16 * pictures
    return torch.randn(2, tokens, D, generator=g), torch.tensor([300.0, 700.0])


@pytest.mark.parametrize("scan", ["alternate", "parallel"])
@pytest.mark.parametrize(("text_tokens", "pictures"), [(8, 1), (0, 1), (20, 0), (20, 2)])
def test_a_full_mask_changes_no_bit(tiny_model: Callable[..., MDM], scan: str, text_tokens: int, pictures: int) -> None:
    model = tiny_model(scan=scan)
    z, t = inputs(text_tokens, pictures)
    full = torch.ones(z.shape[:2])
    with torch.no_grad():
        assert torch.equal(model(z, t, text_tokens, mask=full), model(z, t, text_tokens))
        half = full.clone()
        half[:, ::2] = 0
        assert not torch.equal(model(z, t, text_tokens, mask=half), model(z, t, text_tokens))


@pytest.mark.parametrize("scan", ["alternate", "parallel"])
def test_an_unselected_token_reaches_others_through_convolutions_alone(
    tiny_model: Callable[..., MDM], scan: str
) -> None:
    """With every convolution cut down to its own token, others do not feel it by a bit; with them, they do."""
    z, t = inputs(8, 1)
    mask = torch.ones(2, 24)
    skipped = [2, 5, 11, 17]
    mask[:, skipped] = 0
    others = [i for i in range(24) if i not in skipped]

    def change(model: MDM, tokens: list[int]) -> Tensor:
        moved = z.clone()
        moved[:, tokens] += 1
        with torch.no_grad():
            return (model(moved, t, 8, mask=mask) - model(z, t, 8, mask=mask)).abs().amax((0, 2))  # [L]

    whole, cut = tiny_model(scan=scan), tiny_model(scan=scan)
    cut.backbone.conv_in.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    cut.backbone.conv_out.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    for name, weight in cut.named_parameters():
        if name.endswith("conv1d.weight"):
            weight[..., :-1] = 0
    assert change(cut, skipped)[others].eq(0).all()
    assert change(cut, skipped)[skipped].gt(0).all()  # the token itself is still denoised
    assert change(cut, [0])[others].gt(0).any()  # a selected token does move the state
    assert change(whole, skipped)[others].gt(0).any()
