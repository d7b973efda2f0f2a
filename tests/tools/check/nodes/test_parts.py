"""Where a graph is cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mdm.tools.check.nodes.parts import parts_of

NAMES = st.sampled_from(["latent_in.Add", "orders.1_to_2.Add", "backbone.Add", "to_eps.Sub"])
BLOCKS = st.builds(lambda n, leaf: f"backbone.blocks.{n}.{leaf}", st.integers(0, 3), st.sampled_from(["Add", "x.Mul"]))
OPERATORS = st.sampled_from(["Add", "Less", "Floor"])


@given(st.lists(st.tuples(NAMES | BLOCKS, OPERATORS), min_size=1, max_size=80))
def test_parts_cover_everything_once_in_order(nodes: list[tuple[str, str]]) -> None:
    names, operators = zip(*nodes, strict=True)
    parts = parts_of(names, operators)
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == len(names)
    assert all(part.start < part.end for part in parts)


def names_of(parts: list[str]) -> list[tuple[str, int]]:
    return [(part.name, part.end - part.start) for part in parts_of(parts, ["Add"] * len(parts))]


def test_a_block_is_a_part_with_what_stands_right_before_it() -> None:
    """Nodes in a block, before it and behind it."""
    blocks = [
        *[f"backbone.blocks.0.{n}" for n in range(9)], "orders.1_to_2.Add", "orders.1_to_2.Sub",
        *[f"backbone.blocks.1.{n}" for n in range(9)], "masks.reorder", "backbone.blocks.1.last",
    ]  # fmt: skip
    names = [f"before.{n}" for n in range(7)] + blocks + [f"behind.{n}" for n in range(3)]
    assert names_of(names) == [
        ("before.0 to before.5", 6), ("before.6", 1),
        ("backbone.blocks.0", 9), ("backbone.blocks.1", 13),
        ("behind.0 to behind.2", 3),
    ]  # fmt: skip


def test_two_networks_have_parts_of_their_own() -> None:
    names = [f"backbone.blocks.0.{n}" for n in range(4)] + [f"middle.{n}" for n in range(12)]
    names += [f"low.backbone.blocks.0.{n}" for n in range(4)]
    assert names_of(names) == [
        ("backbone.blocks.0", 4),
        ("middle.0 to middle.4", 5), ("middle.5 to middle.9", 5), ("middle.10 to middle.11", 2),
        ("low.backbone.blocks.0", 4),
    ]  # fmt: skip


def test_a_part_begins_where_numbers_become_decisions() -> None:
    parts = parts_of(["a", "b", "c", "d"], ["Add", "Less", "Cast", "Floor"])
    assert [(part.start, part.end) for part in parts] == [(0, 1), (1, 3), (3, 4)]
