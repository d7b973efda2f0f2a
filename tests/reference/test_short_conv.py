"""The short convolution: the model's own, channels last; causal; its precision; gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from mdm.reference.mixer import CausalConv
from mdm.reference.short_conv import short_conv

Figure = Callable[[str, float, float], None]


@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 5, 40])
def test_it_is_the_models(taps: int, length: int) -> None:
    torch.manual_seed(taps)
    conv, x = CausalConv(10, taps).double(), torch.randn(2, length, 10, dtype=torch.float64)
    y = short_conv(x, conv.weight[:, 0], conv.bias)
    torch.testing.assert_close(y, F.silu(conv(x)), rtol=1e-12, atol=1e-14)
    bare = F.silu(conv(x) - conv.bias)
    torch.testing.assert_close(short_conv(x, conv.weight[:, 0]), bare, rtol=1e-12, atol=1e-14)


def test_two_tokens_by_hand() -> None:
    x, weight = torch.tensor([[[2.0], [-3.0]]]), torch.tensor([[0.5, 4.0]])
    y = short_conv(x, weight, torch.tensor([1.0]))
    totals = torch.tensor([1 + 4 * 2.0, 1 + 0.5 * 2 + 4 * -3.0])
    torch.testing.assert_close(y.flatten(), totals / (1 + torch.exp(-totals)))


def test_a_later_token_changes_no_bit_of_an_earlier_one() -> None:
    x, weight = torch.randn(1, 9, 6), torch.randn(6, 4)
    later = x.clone()
    later[:, 5] = 7
    before, after = short_conv(x, weight), short_conv(later, weight)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all(-1).any()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(kind: torch.dtype) -> None:
    x, weight, bias = torch.randn(2, 50, 8).to(kind), torch.randn(8, 4), torch.randn(8)
    y = short_conv(x, weight, bias)
    assert y.dtype == kind
    assert torch.equal(y, short_conv(x.float(), weight, bias).to(kind))


def test_gradients_are_right() -> None:
    values = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 5, 3), (3, 4), (3,))]
    assert torch.autograd.gradcheck(short_conv, values)
