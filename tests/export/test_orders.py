"""Scan orders as gathers against the reference's permutations, with the text's length known or open."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mdm.export.graph import Graph, Value
from mdm.export.orders import Orders
from mdm.reference.order import Layout

GRIDS = [(0, 0), (1, 1), (1, 5), (5, 1), (3, 3), (3, 4), (4, 3), (9, 5)]  # height, width
PREFIXES = (1, 2, 3, 5)
EVERY_GRID = pytest.mark.parametrize(("height", "width"), GRIDS)


def order_of(layout: Layout, order: int) -> np.ndarray:
    """The tokens' canonical places in that order."""
    place = layout.joint_order(order) if layout.height else layout.text_order(order)
    return place.numpy()


def orders_on(layout: Layout) -> range:
    return range(1, 5 if layout.height else 3)


def graph_of_all(g: Graph, orders: Orders, numbers: range) -> None:
    """x<start> in order `start` -> y<start><to> in order `to`, for all pairs."""
    given = {start: g.input(f"x{start}", "int64", ["batch", f"length{start}"]) for start in numbers}
    for start in numbers:
        for to in numbers:
            g.output(f"y{start}{to}", orders.gather(given[start], start, to), ["batch", f"length{start}{to}"])


def check_all(found: list[np.ndarray], layout: Layout) -> None:
    numbers = orders_on(layout)
    pairs = [(start, to) for start in numbers for to in numbers]
    for (start, to), y in zip(pairs, found, strict=True):
        expected = order_of(layout, to)
        assert (y == np.stack([expected, expected + 100])).all(), f"{start} to {to} on {layout}"


def inputs_of(layout: Layout) -> dict[str, np.ndarray]:
    given = {f"x{start}": order_of(layout, start) for start in orders_on(layout)}
    return {name: np.stack([place, place + 100]) for name, place in given.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
@EVERY_GRID
def test_known_gathers_are_the_references(
    prefix: int, height: int, width: int, blank_graph: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    g, layout = blank_graph(), Layout(prefix, 0, height, width)
    graph_of_all(g, Orders(g, prefix, None, height, width), orders_on(layout))
    check_all(run_graph(g, **inputs_of(layout)), layout)


@pytest.mark.parametrize("prefix", PREFIXES)
@EVERY_GRID
def test_open_gathers_are_the_references_at_every_length(
    prefix: int, height: int, width: int, blank_graph: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    for text in (1, 2, 7):
        g, layout = blank_graph(), Layout(prefix, text, height, width)
        orders = Orders(g, prefix, g.input("text", "int64", []), height, width)
        graph_of_all(g, orders, orders_on(layout))
        check_all(run_graph(g, text=np.array(text), **inputs_of(layout)), layout)


def test_a_gather_undoes_the_one_it_composes_with() -> None:
    """What `check_all` relies on: the place vector from one order to another is inverse of one, then the other."""
    layout = Layout(2, 3, 4, 5)
    for start in range(1, 5):
        for to in range(1, 5):
            index = layout.joint_order(start).argsort()[layout.joint_order(to)]
            assert (layout.joint_order(start)[index] == layout.joint_order(to)).all()


@pytest.fixture(params=["known", "open"])
def orders(request: pytest.FixtureRequest, blank_graph: Callable[..., Graph]) -> Orders:
    g = blank_graph()
    return Orders(g, 2, g.input("text", "int64", []) if request.param == "open" else None, 3, 4)


@pytest.mark.parametrize("order", range(1, 5))
def test_an_order_to_itself_makes_no_node(order: int, orders: Orders) -> None:
    x = orders.g.input("x", "float32", ["batch", "length", 8])
    assert orders.gather(x, order, order) is x
    assert not orders.g.nodes


def test_a_transition_is_made_once(orders: Orders) -> None:
    g = orders.g
    x = g.input("x", "float32", ["batch", "length", 8])
    pairs = [(start, to) for start in range(1, 5) for to in range(1, 5) if start != to]

    def gather_all() -> list[Value]:
        return [orders.gather(x, start, to) for start, to in pairs]

    gather_all()
    nodes, constants = len(g.nodes), len(g.constants)
    gather_all()
    assert [node.op_type for node in g.nodes[nodes:]] == ["Gather"] * len(pairs)
    assert len(g.constants) == constants


def test_known_transitions_are_constants(blank_graph: Callable[..., Graph]) -> None:
    g = blank_graph()
    Orders(g, 2, None, 3, 4).gather(g.input("x", "float32", ["batch", 14, 8]), 1, 4)
    assert [node.op_type for node in g.nodes] == ["Gather"]
