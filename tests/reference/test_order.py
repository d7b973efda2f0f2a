"""Scan orders: permutations, reverses, a 2 x 3 grid written out by hand, and DiM's palindrome of orders."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdm.reference.config import PRESETS, load_config
from mdm.reference.order import Layout, palindrome

layouts = st.builds(Layout, st.integers(2, 6), st.integers(0, 9), st.integers(0, 5), st.integers(1, 5))
# The facts' names of DiM's orders by our index: rows, rows reversed, columns, columns reversed.
FACTS = [0, -2, 1, -1]


@given(layout=layouts, order=st.integers(1, 4))
def test_an_order_is_a_permutation_behind_the_prefix(layout: Layout, order: int) -> None:
    visited = layout.joint_order(order).tolist()
    assert sorted(visited) == list(range(layout.length))
    assert visited[: layout.prefix] == list(range(layout.prefix))
    visited = layout.text_order(min(order, 2)).tolist()
    assert sorted(visited) == list(range(layout.head))
    assert visited[: layout.prefix] == list(range(layout.prefix))


@given(layout=layouts)
def test_even_orders_read_odd_ones_backwards(layout: Layout) -> None:
    prefix = layout.prefix
    for odd in (1, 3):
        forward, backward = layout.joint_order(odd)[prefix:], layout.joint_order(odd + 1)[prefix:]
        assert torch.equal(forward.flip(0), backward)
    assert torch.equal(layout.text_order(1)[prefix:].flip(0), layout.text_order(2)[prefix:])
    assert torch.equal(layout.joint_order(1), torch.arange(layout.length))


@given(layout=layouts)
def test_the_separator_stands_between_text_and_picture(layout: Layout) -> None:
    """And nowhere else: it is there exactly when both are."""
    assert layout.sep == (layout.text > 0 and layout.height > 0)
    assert layout.length == layout.prefix + layout.text + layout.sep + layout.height * layout.width
    for order in (1, 2, 3, 4):
        body = layout.joint_order(order)[layout.prefix :]
        place = layout.text if order in (1, 3) else layout.height * layout.width
        if layout.sep:
            assert int(body[place]) == layout.head


def test_orders_of_a_small_grid_by_hand() -> None:
    """Prefix 0 1, text 2 3, separator 4, grid  5 6 7
    .                                           8 9 10"""
    layout = Layout(prefix=2, text=2, height=2, width=3)
    assert layout.joint_order(1).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert layout.joint_order(2).tolist() == [0, 1, 10, 9, 8, 7, 6, 5, 4, 3, 2]
    assert layout.joint_order(3).tolist() == [0, 1, 2, 3, 4, 5, 8, 6, 9, 7, 10]
    assert layout.joint_order(4).tolist() == [0, 1, 10, 7, 9, 6, 8, 5, 4, 3, 2]
    assert layout.text_order(1).tolist() == [0, 1, 2, 3]
    assert layout.text_order(2).tolist() == [0, 1, 3, 2]


def test_orders_of_a_picture_alone_and_of_text_alone() -> None:
    picture = Layout(prefix=1, text=0, height=2, width=3)
    assert picture.joint_order(2).tolist() == [0, 6, 5, 4, 3, 2, 1]
    assert picture.joint_order(3).tolist() == [0, 1, 4, 2, 5, 3, 6]
    text = Layout(prefix=1, text=3, height=0, width=0)
    assert text.length == 4
    assert text.joint_order(1).tolist() == text.text_order(1).tolist() == [0, 1, 2, 3]
    assert text.joint_order(2).tolist() == text.text_order(2).tolist() == [0, 3, 2, 1]


def facts_list(blocks: int) -> list[int]:
    """DiM facts 1.4, step by step: index 0; +1 a block below mid; -1 a block from mid on; the last is 0."""
    index, middle, listed = 0, 1 + (blocks - 1) // 2, [0]
    for block in range(1, blocks - 1):
        index = (index + 1) % 4 if block < middle else (index - 1) % 4
        listed.append(FACTS[index])
    return [*listed, 0]


@pytest.mark.parametrize("blocks", [5, 7, 9, 11, 25, 49])
def test_palindrome_is_dims_list(blocks: int) -> None:
    listed = [FACTS[palindrome(block, blocks, 4)] for block in range(blocks)]
    assert listed == facts_list(blocks)
    if blocks == 9:  # as the oracle's record of the published network has it
        assert listed == [0, -2, 1, -1, 0, -1, 1, -2, 0]
    if blocks in (25, 49):
        assert listed[: blocks // 2 + 1] == [0] + [-2, 1, -1, 0] * (blocks // 8)
        assert listed[blocks // 2 + 1 :] == [-1, 1, -2, 0] * (blocks // 8)


@pytest.mark.parametrize("blocks", [1, 3, 5, 7, 9, 25, 49])
@pytest.mark.parametrize("orders", [1, 2, 3, 4])
def test_a_skip_joins_two_streams_in_the_same_order(blocks: int, orders: int) -> None:
    """At block mid + j the stream is in the order of block mid + j - 1, the skip in that of block mid - 1 - j."""
    middle = 1 + (blocks - 1) // 2
    for j in range(blocks - middle):
        stream, sent = palindrome(middle + j - 1, blocks, orders), palindrome(middle - 1 - j, blocks, orders)
        assert 0 <= stream == sent < orders
    assert palindrome(0, blocks, orders) == palindrome(blocks - 1, blocks, orders) == 0


def test_every_preset_sends_as_many_skips_as_it_receives() -> None:
    for name in PRESETS:
        config = load_config(name)
        assert config.skip_from - 1 == config.blocks - config.skip_from == config.blocks // 2
