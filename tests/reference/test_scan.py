"""Both scans: the chunked form against the naive one, masks, causality, gradients, precisions, and mamba-ssm.

Letters as in scan.py. Sizes are tiny: 6 channels or 4 heads of width 3, 5 states, 1 to 3 groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mdm.reference.scan import selective_scan, ssd_scan

Figure = Callable[[str, float, float], None]
SCANS: dict[str, Callable[..., Tensor]] = {"selective": selective_scan, "ssd": ssd_scan}
each_scan = pytest.mark.parametrize("name", list(SCANS))
each_form = pytest.mark.parametrize("naive", [True, False], ids=["naive", "chunked"])
torch.set_num_threads(1)


def inputs(
    name: str, length: int, *, batch: int = 2, groups: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    """Everything a scan takes but the mask, by argument name."""
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64).to(dtype)

    channels = 6  # heads, for ssd
    width = (3,) if name == "ssd" else ()
    step, x = ("dt", "x") if name == "ssd" else ("delta", "u")
    return {
        x: normal(batch, length, channels, *width),
        step: normal(batch, length, channels),
        "A": -normal(channels, *(() if name == "ssd" else (5,))).exp(),
        "Bm": normal(batch, length, groups, 5),
        "C": normal(batch, length, groups, 5),
        "D": normal(channels),
        "z": normal(batch, length, channels, *width),
        f"{step}_bias": normal(channels),
    }


def step_name(name: str) -> str:
    return "dt" if name == "ssd" else "delta"


def relative(y: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    return float((y - expected).abs().max() / expected.abs().max())


@each_scan
def test_chunked_is_naive(figure: Figure, name: str) -> None:
    scan, worst = SCANS[name], 0.0
    for length, groups in itertools.product([1, 7, 63, 64, 65, 300], [1, 2, 3]):
        arguments = inputs(name, length, groups=groups)
        expected = scan(**arguments, naive=True)
        assert expected.shape == next(iter(arguments.values())).shape
        for chunk in (5, 64, 1000):
            y = scan(**arguments, chunk_size=chunk)
            assert y.shape == expected.shape
            worst = max(worst, relative(y, expected))
    figure(f"{name} scan chunked - naive, float64", worst, 1e-10)


@each_scan
@pytest.mark.parametrize("dropped", ["D", "z", "bias", "D z", "z bias", "D z bias"])
@pytest.mark.parametrize("masked", [False, True])
def test_optional_inputs(name: str, dropped: str, masked: bool) -> None:
    """Each may be absent; chunked and naive agree, and leaving it out is what its neutral value does."""
    arguments = inputs(name, 70, groups=2)
    mask = {"mask": (torch.arange(70) % 3 > 0).double().expand(2, -1)} if masked else {}
    drop = [f"{step_name(name)}_bias" if word == "bias" else word for word in dropped.split()]
    less = {key: value for key, value in arguments.items() if key not in drop}
    y = SCANS[name](**less, **mask)
    assert relative(y, SCANS[name](**less, **mask, naive=True)) < 1e-10
    neutral = {key: torch.zeros_like(arguments[key]) for key in drop if key != "z"}
    gate = {"z": torch.full_like(arguments["z"], 2.0)} if "z" in drop else {}
    expected = SCANS[name](**{**arguments, **neutral, **gate}, **mask)
    if gate:
        expected = expected / F.silu(torch.tensor(2.0, dtype=torch.float64))
    assert relative(y, expected) < 1e-12


@each_scan
@pytest.mark.parametrize("case", ["strong", "none", "still", "mixed"])
def test_extreme_decay(figure: Figure, name: str, case: str) -> None:
    """exp underflows to 0; no decay at all; steps of size 0; strong and weak decay by turns."""
    arguments = inputs(name, 200, groups=2)
    step = step_name(name)
    if case == "strong":
        arguments["A"] = torch.full_like(arguments["A"], -1e5)
    elif case == "none":
        arguments["A"] = torch.zeros_like(arguments["A"])
    elif case == "still":
        arguments[step] = torch.full_like(arguments[step], -1e9)  # softplus gives exactly 0
    else:
        arguments[step][:, ::7] = 1e4
        arguments[step][:, 1::7] = -20
    y, expected = SCANS[name](**arguments), SCANS[name](**arguments, naive=True)
    assert bool(y.isfinite().all())
    if case == "still":
        x = next(iter(arguments.values()))
        D = arguments["D"] if name == "selective" else arguments["D"][:, None]
        torch.testing.assert_close(y, D * x * F.silu(arguments["z"]), rtol=1e-14, atol=0)
    figure(f"{name} scan chunked - naive, decay {case}, float64", relative(y, expected), 1e-10)


@each_scan
def test_float32_keeps_its_digits_after_strong_decay(figure: Figure, name: str) -> None:
    """A chunk that decays by exp(-5000) and then hardly at all: sums of log decays must not swallow the small ones."""
    arguments = inputs(name, 128, batch=1)
    step = step_name(name)
    arguments["A"] = torch.full_like(arguments["A"], -16.0)
    del arguments[f"{step}_bias"]
    sizes = torch.full((128,), 0.01, dtype=torch.float64)
    sizes[:64:2] = 10.0
    arguments[step] = torch.log(torch.expm1(sizes))[None, :, None].expand_as(arguments[step])
    single = {key: value.float() for key, value in arguments.items()}
    expected = SCANS[name](**arguments, naive=True)
    naive = relative(SCANS[name](**single, naive=True), expected)
    figure(f"{name} scan float32 naive after strong decay", naive, 1e-5)
    chunked = relative(SCANS[name](**single, chunk_size=128), expected)
    figure(f"{name} scan float32 chunked after strong decay", chunked, 1e-5)


@each_scan
@each_form
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (0, 100), (2, 0)])
def test_nothing_in_nothing_out(name: str, naive: bool, batch: int, length: int) -> None:
    arguments = inputs(name, length, batch=batch)
    y = SCANS[name](**arguments, naive=naive)
    assert y.shape == next(iter(arguments.values())).shape


@each_scan
@each_form
def test_gradients(name: str, naive: bool) -> None:
    """Against differences, through softplus, mask, skip and gate; six tokens in chunks of four."""
    arguments = inputs(name, 6, batch=1, groups=2)
    keys = list(arguments)
    mask = torch.tensor([[1.0, 1, 0, 1, 1, 1]], dtype=torch.float64)

    def scan(*values: Tensor) -> Tensor:
        return SCANS[name](**dict(zip(keys, values, strict=True)), mask=mask, chunk_size=4, naive=naive)

    values = [value.clone().requires_grad_() for value in arguments.values()]
    assert torch.autograd.gradcheck(scan, values, fast_mode=True)


@each_scan
def test_gradients_stay_finite_under_strong_decay(name: str) -> None:
    arguments = {key: value.float().requires_grad_() for key, value in inputs(name, 130).items()}
    arguments["A"] = torch.full_like(arguments["A"], -1e6).requires_grad_()
    SCANS[name](**arguments).sum().backward()
    assert all(bool(value.grad.isfinite().all()) for value in arguments.values() if value.grad is not None)


@each_scan
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unselected_token_is_not_there(name: str, naive: bool, dtype: torch.dtype) -> None:
    """Whatever it holds, no other token's output changes by a bit; and they are those of a sequence without it."""
    length, step = 75, step_name(name)
    arguments = inputs(name, length, groups=2, dtype=dtype)
    mask = torch.ones(2, length, dtype=dtype)
    mask[:, [0, 3, 4, 62, 63, 64, 74]] = 0
    chosen = mask[0] > 0
    y = SCANS[name](**arguments, mask=mask, naive=naive)
    others = dict(arguments)
    for key in (next(iter(arguments)), "Bm", step):
        others[key] = arguments[key].clone()
        others[key][:, ~chosen] = 1e3 * inputs(name, length, groups=2, dtype=dtype, seed=1)[key][:, ~chosen]
    torch.testing.assert_close(SCANS[name](**others, mask=mask, naive=naive)[:, chosen], y[:, chosen], rtol=0, atol=0)
    short = {key: value[:, chosen] if value.ndim > 2 else value for key, value in arguments.items()}
    without = SCANS[name](**short, naive=naive)
    assert relative(y[:, chosen], without) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert not torch.equal(y[:, chosen], SCANS[name](**arguments, naive=naive)[:, chosen])


@each_scan
@each_form
@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.int64])
def test_a_mask_of_ones_changes_no_bit(name: str, naive: bool, kind: torch.dtype) -> None:
    arguments = inputs(name, 75, groups=2, dtype=torch.float32)
    mask = torch.ones(2, 75, dtype=kind)
    assert torch.equal(SCANS[name](**arguments, mask=mask, naive=naive), SCANS[name](**arguments, naive=naive))


@each_scan
@each_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(name: str, naive: bool, dtype: torch.dtype) -> None:
    half = inputs(name, 75, groups=2, dtype=dtype)
    y = SCANS[name](**half, naive=naive)
    assert y.dtype == dtype
    wide = SCANS[name](**{key: value.float() for key, value in half.items()}, naive=naive)
    assert torch.equal(y, wide.to(dtype))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_past_does_not_see_the_future(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(SCANS)))
    length = data.draw(st.integers(2, 40))
    cut, chunk = data.draw(st.integers(1, length - 1)), data.draw(st.integers(1, 17))
    naive = data.draw(st.booleans())
    whole = inputs(name, length, seed=1)
    other = inputs(name, length, seed=2)
    spliced = {
        key: torch.cat([value[:, :cut], other[key][:, cut:]], dim=1) if value.ndim > 2 else value
        for key, value in whole.items()
    }
    y, z = (SCANS[name](**arguments, chunk_size=chunk, naive=naive) for arguments in (whole, spliced))
    torch.testing.assert_close(y[:, :cut], z[:, :cut], rtol=1e-12, atol=1e-13)
    assert not torch.equal(y[:, cut:], z[:, cut:])


# ------------------------------------------------------------------------------------- against mamba-ssm, float32


@each_form
def test_selective_scan_is_mamba_ssms(figure: Figure, mamba_ssm: SimpleNamespace, naive: bool) -> None:
    worst = 0.0
    for length, groups in itertools.product([1, 64, 150], [1, 2]):
        a = inputs("selective", length, groups=groups, dtype=torch.float32)
        expected = mamba_ssm.selective_scan(
            a["u"].mT, a["delta"].mT, a["A"], a["Bm"].permute(0, 2, 3, 1), a["C"].permute(0, 2, 3, 1),
            a["D"], z=a["z"].mT, delta_bias=a["delta_bias"], delta_softplus=True,
        ).mT  # fmt: skip
        worst = max(worst, relative(selective_scan(**a, naive=naive), expected))
    figure(f"selective_scan {'naive' if naive else 'chunked'} - mamba-ssm", worst, 1e-5)


@each_form
def test_ssd_scan_is_mamba_ssms(figure: Figure, mamba_ssm: SimpleNamespace, naive: bool) -> None:
    worst = 0.0
    for length, groups in itertools.product([1, 64, 150], [1, 2]):
        a = inputs("ssd", length, groups=groups, dtype=torch.float32)
        options = {key: a[key] for key in ("D", "z", "dt_bias")}
        expected = mamba_ssm.ssd(a["x"], a["dt"], a["A"], a["Bm"], a["C"], 64, dt_softplus=True, **options)
        worst = max(worst, relative(ssd_scan(**a, naive=naive), expected))
    figure(f"ssd_scan {'naive' if naive else 'chunked'} - mamba-ssm", worst, 1e-5)


def test_ssd_scan_is_the_papers_listing(figure: Figure, mamba_ssm: SimpleNamespace) -> None:
    """Mamba-2's Listing 1 takes x and A already times the step, B and C for each head; here in float64."""
    a = inputs("ssd", 128, groups=2)
    size = F.softplus(a["dt"] + a["dt_bias"])
    B, C = (a[key].repeat_interleave(3, dim=2) for key in ("Bm", "C"))
    expected, _ = mamba_ssm.ssd_minimal(a["x"] * size[..., None], size * a["A"], B, C, 64)
    y = ssd_scan(a["x"], a["dt"], a["A"], a["Bm"], a["C"], dt_bias=a["dt_bias"])
    figure("ssd_scan - Mamba-2 Listing 1, float64", relative(y, expected), 1e-12)
