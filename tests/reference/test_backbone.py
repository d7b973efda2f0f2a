"""The network on sequences of every kind: which mixers run and how they are averaged, masks, rows, precisions.

Padding and scan orders against the published network: test_dim_oracle.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mdm.reference.backbone import Backbone, Block, resize_position
from mdm.reference.config import Config, config_from_dict
from mdm.reference.order import Layout

Figure = Callable[[str, float, float], None]
torch.set_num_threads(1)
SIDE, TEXT, WIDTH = 3, 5, 32


def config(**fields: Any) -> Config:
    return config_from_dict(
        {
            "family": "mdm", "width": WIDTH, "blocks": 5, "image_size": 6, "classes": 3, "state": 8, "head": 16,
            "latent": 4, "vae_width": 8, "vocabulary": 11, "text_lengths": (TEXT, 9), **fields,
        }
    )  # fmt: skip


def network(**fields: Any) -> Backbone:
    """Random in every parameter: nothing that a test could miss is zero or one."""
    torch.manual_seed(0)
    backbone = Backbone(config(**fields))
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return backbone.eval()


def request(kind: str, batch: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(1)
    text = torch.randn(batch, TEXT, WIDTH, generator=draws).to(dtype)
    height = 2 * SIDE if kind == "stacked" else SIDE
    image = torch.randn(batch, height, SIDE, WIDTH, generator=draws).to(dtype)
    t = torch.linspace(1, 1000, batch).to(dtype)
    y = torch.arange(batch) % 4
    return {"text": None if kind == "image" else text, "image": None if kind == "text" else image, "t": t, "y": y}


KINDS = ["text", "image", "both", "stacked"]
kinds = pytest.mark.parametrize("kind", KINDS)
scans = pytest.mark.parametrize("fields", [{"scan": "alternate"}, {"scan": "parallel"}, {"mixer": "mamba1"}], ids=str)


def flat(outputs: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Both segments as one [B,L,E]."""
    return torch.cat([part.flatten(1, -2) for part in outputs if part is not None], dim=1)


# --------------------------------------------------------------------------------------- mixers and averaging


class Constant(nn.Module):
    """A mixer that says its number for every token, and notes that it ran."""

    def __init__(self, number: float, calls: list[tuple[float, int]]) -> None:
        super().__init__()
        self.number, self.calls = number, calls

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.append((self.number, u.shape[1]))
        return torch.full_like(u, self.number)


def updates(scan_orders: str, layout: Layout) -> tuple[Tensor, list[tuple[float, int]]]:
    """What one parallel block adds to each token, its mixers being the constants 1, 10, 100, ... -> [L], calls."""
    block = Block(config(scan="parallel", scan_orders=scan_orders), 1)
    calls: list[tuple[float, int]] = []
    block.mixers = nn.ModuleList(Constant(10.0**i, calls) for i in range(len(block.mixers)))
    h = torch.randn(1, layout.length, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        block.double().modulation.zero_()
        added = block(h, h.new_zeros(1, 3, WIDTH), layout, None, None) - h
    torch.testing.assert_close(added, added[..., :1].expand_as(added), rtol=1e-9, atol=0)
    return added[0, :, 0], calls


def test_parallel_averages_over_the_mixers_that_saw_a_token() -> None:
    """Prefix and text are seen by all six, separator and picture by the four over the whole sequence."""
    layout = Layout(prefix=3, text=TEXT, height=4, width=4)
    added, calls = updates("1234/12", layout)
    length = layout.length
    assert calls == [(1, length), (10, length), (100, length), (1000, length), (1e4, 8), (1e5, 8)]
    torch.testing.assert_close(added[:8], torch.full((8,), 111111 / 6, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(added[8:], torch.full((17,), 1111 / 4, dtype=torch.float64), rtol=1e-9, atol=0)


def test_text_alone_runs_the_two_text_mixers() -> None:
    added, calls = updates("1234/12", Layout(prefix=3, text=TEXT, height=0, width=0))
    assert calls == [(1e4, 8), (1e5, 8)]
    torch.testing.assert_close(added, torch.full((8,), 110000 / 2, dtype=torch.float64), rtol=1e-9, atol=0)


def test_a_picture_alone_runs_the_four_image_mixers() -> None:
    layout = Layout(prefix=3, text=0, height=4, width=4)
    added, calls = updates("1234/12", layout)
    assert [number for number, _ in calls] == [1, 10, 100, 1000]
    torch.testing.assert_close(added, torch.full((19,), 1111 / 4, dtype=torch.float64), rtol=1e-9, atol=0)


def test_scan_orders_choose_the_mixers() -> None:
    layout = Layout(prefix=3, text=TEXT, height=4, width=4)
    added, calls = updates("12/1", layout)
    assert calls == [(1, layout.length), (10, layout.length), (100, 8)]
    torch.testing.assert_close(added[:8], torch.full((8,), 111 / 3, dtype=torch.float64), rtol=1e-9, atol=0)
    torch.testing.assert_close(added[8:], torch.full((17,), 11 / 2, dtype=torch.float64), rtol=1e-9, atol=0)
    _, calls = updates("12/1", Layout(prefix=3, text=TEXT, height=0, width=0))
    assert [number for number, _ in calls] == [100]


def test_each_mixer_reads_its_own_order() -> None:
    """A mixer that says which place it reads a token at; parallel mixers see orders 1 2 3 4 and text 1 2."""
    block = Block(config(scan="parallel"), 1)
    layout = Layout(prefix=3, text=2, height=2, width=2)
    orders = [order.tolist() for _, order in block.scans(layout)]
    assert orders[:4] == [layout.joint_order(k).tolist() for k in (1, 2, 3, 4)]
    assert orders[4:] == [[0, 1, 2, 3, 4], [0, 1, 2, 4, 3]]
    assert [mixer for mixer, _ in block.scans(layout)] == list(block.mixers)


def test_alternating_text_follows_the_text_orders() -> None:
    """Without a picture the cycle is 1 2, and the palindrome runs over it."""
    layout = Layout(prefix=3, text=4, height=0, width=0)
    backward = [
        block.scans(layout)[0][1].tolist() == layout.text_order(2).tolist()
        for block in (Block(config(), index) for index in range(5))
    ]
    assert backward == [False, True, False, True, False]


# ---------------------------------------------------------------------------------------------- whole network


@scans
def test_shapes_and_rows(figure: Figure, fields: dict[str, Any]) -> None:
    """A row's result does not depend on its neighbours in the batch; in float64, where only a mistake shows."""
    model, worst = network(**fields).double(), 0.0
    for kind in KINDS:
        asked = request(kind, dtype=torch.float64)
        with torch.no_grad():
            text, image = model(**asked)
            assert (text is None) == (kind == "image")
            assert (image is None) == (kind == "text")
            assert text is None or text.shape == asked["text"].shape
            assert image is None or image.shape == asked["image"].shape
            whole = flat((text, image))
            for row in range(3):
                alone = {key: value if value is None else value[row : row + 1] for key, value in asked.items()}
                apart = (flat(model(**alone)) - whole[row : row + 1]).abs().max()
                worst = max(worst, float(apart / whole.abs().max()))
    figure(f"backbone {'/'.join(fields.values())}: a row alone, float64", worst, 1e-12)


@kinds
@scans
def test_float64(kind: str, fields: dict[str, Any]) -> None:
    model, asked = network(**fields), request(kind)
    double = {key: value.double() if key != "y" and value is not None else value for key, value in asked.items()}
    with torch.no_grad():
        single = flat(model(**asked))
        wide = flat(model.double()(**double))
    assert wide.dtype == torch.float64
    assert float((single - wide).abs().max() / wide.abs().max()) < 1e-4


@kinds
@scans
def test_masks_through_the_whole_network(kind: str, fields: dict[str, Any]) -> None:
    """All selected changes no bit; some unselected changes the others."""
    model, asked = network(**fields), request(kind)
    masks = {
        f"{key}_mask": None if asked[key] is None else torch.ones(asked[key].shape[:-1]) for key in ("text", "image")
    }
    with torch.no_grad():
        plain = model(**asked)
        assert torch.equal(flat(model(**asked, **masks)), flat(plain))
        for mask in masks.values():
            if mask is not None:
                mask[:, 1] = 0
        assert not torch.equal(flat(model(**asked, **masks)), flat(plain))


def test_prefix_separator_and_pads_are_always_selected() -> None:
    model = network()
    prefix = torch.zeros(2, 3, WIDTH)
    mask = model.full_mask(prefix, torch.zeros(2, TEXT), torch.zeros(2, SIDE, SIDE))
    assert mask is not None
    grid = [[0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert mask[1].int().tolist() == [1] * 3 + [0] * TEXT + [1] + [cell for row in grid for cell in row]
    assert model.full_mask(prefix, None, None) is None
    text_only = model.full_mask(prefix, torch.zeros(2, TEXT), None)
    assert text_only is not None
    assert text_only[0].tolist() == [1] * 3 + [0] * TEXT


def test_everything_that_is_told_matters() -> None:
    """Time, class, text and picture each change every other token's output."""
    model, asked = network(scan="parallel"), request("both")
    with torch.no_grad():
        plain = model(**asked)
        for key, change in (("t", 0.5), ("y", 1), ("text", 1.0), ("image", 1.0)):
            text, image = model(**{**asked, key: (asked[key] + change) % 4 if key == "y" else asked[key] + change})
            assert float((text - plain[0]).abs().amax(-1).min()) > 1e-6, key
            assert float((image - plain[1]).abs().amax(-1).min()) > 1e-6, key


def test_stacked_pictures_have_the_positions_of_one() -> None:
    model = network()
    one, two = model.grid_position(SIDE, SIDE), model.grid_position(2 * SIDE, SIDE)
    assert torch.equal(one, model.position[:, 2:].view(1, SIDE, SIDE, WIDTH))
    assert torch.equal(two[:, :SIDE], one)
    assert torch.equal(two[:, SIDE:], one)
    assert torch.equal(model.grid_position(5, 4), resize_position(model.position[:, 2:], 5, 4).view(1, 5, 4, WIDTH))
