"""The mixers against mamba-ssm's modules with the same weights, and the causal convolution against torch's own.

The modules run on mamba-ssm's slow path and its reference functions (conftest.py), in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdm.reference.config import Config, config_from_dict
from mdm.reference.mixer import CausalConv, Mamba1, Mamba2, initial_step_bias

Figure = Callable[[str, float, float], None]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def config(mixer: str, **fields: Any) -> Config:
    return config_from_dict(
        {
            "family": "dim", "width": 48, "blocks": 3, "in_channels": 4, "image_size": 8, "classes": 3, "mixer": mixer,
            "head": 8, "state": 16, **fields,
        }
    )  # fmt: skip


def stirred(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter moved off its initial value: D, the norm's weight and the biases are not ones and zeros."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=draws)
    return module.eval()


def tokens(length: int, width: int = 48) -> Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def worst_over_lengths(ours: nn.Module, theirs: nn.Module) -> float:
    """With the weights of `theirs`, which must load under the same names."""
    ours.load_state_dict(theirs.state_dict())
    worst = 0.0
    for length in (1, 2, 65, 130):
        u = tokens(length)
        expected = theirs(u)
        worst = max(worst, float((ours(u) - expected).abs().max() / expected.abs().max()))
    return worst


@pytest.mark.parametrize(("taps", "expand"), [(3, 2), (4, 1)])
def test_mamba1_is_mamba_ssms(figure: Figure, mamba_ssm: SimpleNamespace, taps: int, expand: int) -> None:
    theirs = mamba_ssm.Mamba(48, d_state=16, d_conv=taps, expand=expand, use_fast_path=False)
    worst = worst_over_lengths(Mamba1(config("mamba1", conv=taps, expand=expand)), stirred(theirs))
    figure(f"Mamba1 - mamba-ssm, {taps} taps, expand {expand}", worst, 1e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_mamba_ssms(figure: Figure, mamba_ssm: SimpleNamespace, groups: int) -> None:
    """With two groups mamba-ssm normalises each half of the inner width by itself.

    A trap for whoever looks elsewhere: its `mamba_split_conv1d_scan_ref` forgets the groups there, and so equals its
    own module for one group only. The module is what released checkpoints were trained with.
    """
    theirs = mamba_ssm.Mamba2(48, d_state=16, d_conv=4, headdim=8, ngroups=groups, use_mem_eff_path=False)
    worst = worst_over_lengths(Mamba2(config("mamba2", conv=4, groups=groups)), stirred(theirs))
    figure(f"Mamba2 - mamba-ssm, {groups} groups", worst, 1e-5)


@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 50])
def test_causal_convolution_is_torchs(taps: int, length: int) -> None:
    """nn.Conv1d on channels first, padded on both sides and cropped, as mamba-ssm does it."""
    conv = CausalConv(10, taps).double()
    x = tokens(length, 10).double()
    expected = F.conv1d(x.mT, conv.weight, conv.bias, padding=taps - 1, groups=10)[..., :length].mT
    torch.testing.assert_close(conv(x), expected, rtol=1e-13, atol=1e-14)
    by_hand = conv.bias + sum(
        conv.weight[:, 0, taps - 1 - k] * x[:, length - 1 - k] for k in range(min(taps, length))
    )  # the last token, tap by tap
    torch.testing.assert_close(conv(x)[:, -1], by_hand, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_the_past_does_not_see_the_future(mixer: str) -> None:
    module = stirred((Mamba1 if mixer == "mamba1" else Mamba2)(config(mixer))).double()
    u = tokens(40).double()
    changed = u.clone()
    changed[:, 23:] += 1
    torch.testing.assert_close(module(u)[:, :23], module(changed)[:, :23], rtol=1e-12, atol=1e-13)
    assert float((module(u) - module(changed))[:, 23].detach().abs().min(-1).values.max()) > 0


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_an_unselected_token_reaches_its_neighbours_through_the_convolution_alone(mixer: str) -> None:
    """It leaves the state alone, but K = 3 taps show it to the next two tokens. Where those are unselected as well,
    nothing of it goes further.
    """
    module = stirred((Mamba1 if mixer == "mamba1" else Mamba2)(config(mixer)))
    u, mask = tokens(20), torch.ones(2, 20)
    mask[:, 7:10] = 0
    changed = u.clone()
    changed[:, 7] += 1
    y, z = module(u, mask), module(changed, mask)
    apart = (y - z).detach().abs().amax(dim=(0, 2))
    assert float(apart[10:].max()) == float(apart[:7].max()) == 0
    assert float(apart[7:10].min()) > 1e-3
    assert float((module(u) - module(changed)).detach().abs().amax(dim=(0, 2))[10:].min()) > 0
    assert torch.equal(module(u), module(u, torch.ones(2, 20)))


def test_first_step_sizes_are_spread_over_two_decades() -> None:
    torch.manual_seed(0)
    sizes = F.softplus(initial_step_bias(20000).double())
    assert 1e-3 * 0.999 < float(sizes.min()) < 1.01e-3
    assert 0.099 < float(sizes.max()) < 0.1001
    assert float(sizes.log10().mean()) == pytest.approx(-2, abs=0.02)
