"""Which kernels serve which sizes."""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import Any

import pytest

pytest.importorskip("triton")

from mdm.plugins.contract import ACTIVATIONS, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, Operator
from mdm.plugins.errors import InputError
from mdm.plugins.gpu.variants import (
    HAS_START,
    KERNELS,
    SSD_STATES,
    Plan,
    choose,
    serves,
    size_of,
    variants,
    workspace_limit,
)

SSD = {"B": 2, "L": 1064, "H": 64, "P": 64, "G": 1, "N": 128}
SELECTIVE = {"B": 2, "L": 4494, "D": 3072, "G": 1, "N": 16}


def plan_for(operator: Operator, sizes: dict[str, int], dtype: str = "bfloat16", **gpu: Any) -> Plan:
    return choose(operator, dtype, sizes, **({"has": 15, "multiprocessors": 132, "capability": (9, 0)} | gpu))


def test_arguments_are_the_kernels_own() -> None:
    for variant in variants():
        kernel = KERNELS[variant.kernel]
        function = getattr(import_module(kernel.module), variant.kernel)
        assert [name for name, _, _ in kernel.arguments] + [*variant.constants] == function.arg_names


def test_what_is_chosen_is_there() -> None:
    """Over sizes of every kind: the variant is compiled, each integer keeps its divisor, and the grid covers y."""
    known = [*variants()]
    assert len({repr(variant) for variant in known}) == len(known)
    used = set()
    for dtype, N, P, B, heads, L, major in itertools.product(
        ACTIVATIONS, SSD_STATES, (32, 64, 96, 128), (1, 8), (1, 24, 128), (1, 64, 1000, 16384), (8, 9)
    ):
        for operator, sizes in (
            (SSD_SCAN, {"B": B, "L": L, "H": heads, "P": P, "G": 1, "N": N}),
            (SELECTIVE_SCAN, {"B": B, "L": L, "D": heads * P, "G": 1, "N": 16}),
            (SHORT_CONV, {"B": B, "L": L, "D": heads * P, "K": 2 + (B + heads) % 3}),
        ):
            plan = plan_for(operator, sizes, dtype, capability=(major, 0), has=operator.has_all)
            for launch in plan.launches:
                assert launch.variant in known
                used.add(known.index(launch.variant))
                assert serves(launch.variant, (major, 0))
                arguments = KERNELS[launch.variant.kernel].arguments
                assert all(launch.numbers[name] % divisor == 0 for name, type_, divisor in arguments if type_ == "i32")
            assert plan.places[""] <= workspace_limit(operator, dtype, sizes.get("N", 0))
            if operator is SHORT_CONV:
                assert plan.launches[0].grid[1] * 16 >= L > (plan.launches[0].grid[1] - 1) * 16
                continue
            scan = plan.launches[-1]
            assert scan.grid[1] * scan.numbers["segment"] >= L > (scan.grid[1] - 1) * scan.numbers["segment"]
            assert scan.grid[0] * scan.variant.constants["W"] >= heads * P
            assert bool(plan.scratch) == (scan.numbers["has"] == 15 | HAS_START) == (scan.grid[1] > 1)
    assert used == {*range(len(known))}, "compiled, and never chosen"


@pytest.mark.parametrize(
    ("changes", "width", "segments"),
    [
        ({}, 32, 1),  # 128 programs of width 64 would leave four multiprocessors idle
        ({"B": 8}, 64, 1),
        ({"H": 128, "B": 3}, 64, 1),
        ({"H": 16, "B": 1, "L": 256}, 32, 1),  # too short
        ({"H": 16, "B": 1, "L": 4096}, 32, 8),
        ({"H": 16, "B": 1, "L": 1064}, 32, 4),  # as many as there are 256 tokens
        ({"H": 32, "B": 1, "L": 4096, "P": 128}, 32, 1),  # 128 programs: more than half of the chip
    ],
)
def test_rule(changes: dict[str, int], width: int, segments: int) -> None:
    scan = plan_for(SSD_SCAN, SSD | changes).launches[-1]
    assert (scan.variant.constants["W"], scan.grid[1]) == (width, segments)


@pytest.mark.parametrize(("rule", "size"), [("B", 3), ("1", 1), ("R/W*G", 8), ("R/W", 4), ("R*B/W", 10), ("G*2", 4)])
def test_size_of_a_grid(rule: str, size: int) -> None:
    assert size_of(rule, {"B": 3, "R": 100, "W": 32, "G": 2}) == size


def test_launches_of_a_cut_sequence() -> None:
    states, carry, scan = (plan := plan_for(SSD_SCAN, SSD | {"B": 1, "H": 16, "L": 4000})).launches
    assert [launch.variant.kernel for launch in plan.launches] == ["ssd_segment_states", "carry_states", "ssd_scan"]
    assert plan.scratch == {"states": (1, 8, 16, 128, 64), "step_sums": (1, 8, 16)}
    assert (states.grid, carry.grid, scan.grid) == ((32, 8, 1), (512, 1, 1), (32, 8, 1))
    assert scan.numbers["segment"] == 512
    plan = plan_for(SELECTIVE_SCAN, SELECTIVE | {"B": 1, "D": 1024})
    assert plan.scratch == {"states": (1, 8, 1024, 16), "step_sums": (1, 8, 1024)}


def test_workspaces_are_bounded_closely() -> None:
    """On the largest GPU there may be, long sequences of few heads come near the bound."""
    gpu = {"multiprocessors": 1000}
    for operator, sizes in ((SSD_SCAN, SSD | {"B": 1, "H": 8, "L": 65536}), (SELECTIVE_SCAN, SELECTIVE | {"L": 65536})):
        for heads in range(1, 9):
            plan = plan_for(operator, sizes | {"H": heads, "D": 96 * heads}, **gpu)
            assert plan.places[""] <= workspace_limit(operator, "bfloat16", sizes["N"]) <= 1.2 * plan.places[""]


@pytest.mark.parametrize("empty", ["B", "L", "H"])
def test_nothing_to_do(empty: str) -> None:
    assert plan_for(SSD_SCAN, SSD | {empty: 0}) == Plan((), ())


@pytest.mark.parametrize(
    ("operator", "sizes", "dtype", "said"),
    [
        (SSD_SCAN, SSD | {"N": 48}, "float16", "N = 48\nexpected one of 16, 32, 64, 128"),
        (SSD_SCAN, SSD | {"P": 48}, "float16", "P = 48\nexpected a multiple of 32"),
        (SELECTIVE_SCAN, SELECTIVE | {"N": 8}, "float16", "N = 8\nexpected one of 16"),
        (SELECTIVE_SCAN, SELECTIVE | {"G": 3 * 128}, "float16", "D / G = 8\nexpected a multiple of 16"),
        (SSD_SCAN, SSD, "float64", "type 'float64'"),
        (SSD_SCAN, SSD | {"L": 1 << 19}, "float16", "2147745792 elements is too large"),
    ],
)
def test_what_no_kernel_serves(operator: Operator, sizes: dict[str, int], dtype: str, said: str) -> None:
    with pytest.raises(InputError, match=f"{operator.name}: .*{said}") as caught:
        plan_for(operator, sizes, dtype)
    assert len(str(caught.value).splitlines()) <= 3
