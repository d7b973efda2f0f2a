"""Which kernels serve which sizes."""

from __future__ import annotations

import itertools
from importlib import import_module
from random import Random
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
    operators_of,
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
            assert plan.places[""] <= workspace_limit(operator, dtype, sizes)
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


def any_sizes(operator: Operator, random: Random, most: dict[str, int] | None = None) -> dict[str, int]:
    """Such as kernels serve, up to `most`: few and many programs, short and long sequences."""

    def up_to(letter: str, highest: int, step: int = 1) -> int:
        highest = min(highest, most[letter] if most else highest)
        return step * max(1, int((highest // step) ** random.random()))  # small ones as often as large ones

    highest = most["N"] if most else 128
    states = [N for N in SSD_STATES if highest >= N]
    sizes = {"B": up_to("B", 300), "L": up_to("L", 20000), "K": 4}
    if operator is SSD_SCAN:
        return sizes | {"H": up_to("H", 128), "P": up_to("P", 128, 32), "G": 1, "N": random.choice(states)}
    D = up_to("D", 8192, 16)
    return sizes | {"D": D, "G": random.choice([G for G in (1, 2, 3, 64) if D % (16 * G) == 0]), "N": 16}


@pytest.mark.parametrize("operator", [SSD_SCAN, SELECTIVE_SCAN, SHORT_CONV], ids=lambda operator: operator.torch_name)
def test_no_plan_exceeds_the_workspace_of_larger_sizes(operator: Operator) -> None:
    """On any GPU; and where there is none, no sequence is long enough to be cut."""
    random, cut, free = Random(7), 0, 0
    for _ in range(400):
        dtype, most = random.choice(ACTIVATIONS), any_sizes(operator, random)
        limit = workspace_limit(operator, dtype, most)
        assert (limit == 0) == (operator is SHORT_CONV or most["L"] < 512)
        free += limit == 0
        for _ in range(20):
            gpu = {"multiprocessors": random.randint(1, 400), "capability": random.choice([(8, 6), (9, 0), (12, 0)])}
            plan = plan_for(operator, any_sizes(operator, random, most), dtype, has=0, **gpu)
            assert plan.places[""] <= limit
            cut += bool(plan.scratch)
    assert free > 40
    assert (cut > 200) == (operator is not SHORT_CONV)


def test_workspaces_are_bounded_closely() -> None:
    """On the largest GPU there may be: to the sums of heads that are wider than the narrowest."""
    for operator, sizes, letter, widths in (
        (SSD_SCAN, SSD | {"B": 1}, "H", range(1, 49)),
        (SELECTIVE_SCAN, SELECTIVE | {"B": 1}, "D", range(32, 3073, 32)),
    ):
        all_, most = sizes | {letter: widths[-1], "L": 65536}, 0
        for width in widths:
            for L in (512, 1024):  # where the plan for the largest sizes takes most
                largest = sizes | {letter: width, "L": L}
                taken = plan_for(operator, largest, multiprocessors=1000).places[""]
                assert taken <= workspace_limit(operator, "bfloat16", largest) <= 1.01 * taken
            most = max(most, plan_for(operator, all_ | {letter: width}, multiprocessors=1000).places[""])
        assert most <= workspace_limit(operator, "bfloat16", all_) <= 1.01 * most
    joint = SSD | {"B": 1, "H": 16, "L": 1064}
    assert workspace_limit(SSD_SCAN, "bfloat16", joint) == 4 * (16 * 64 * 4 * 128 + 16 * 2 * 4)
    assert workspace_limit(SSD_SCAN, "bfloat16", joint | {"B": 16}) == 4 * (384 * 32 * 128 + 384)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [(SSD_SCAN, {"H": 64, "P": 64, "G": 2, "N": 128}), (SHORT_CONV, {"D": 4096 + 2 * 2 * 128, "K": 4})]),
        ({"mixer": "mamba1"}, [(SELECTIVE_SCAN, {"D": 4096, "G": 2, "N": 128}), (SHORT_CONV, {"D": 4096, "K": 4})]),
    ],
)
def test_a_models_operators(changes: dict[str, str], expected: list[tuple[Operator, dict[str, int]]]) -> None:
    config = {"width": 2048, "expand": 2, "state": 128, "groups": 2, "head": 64, "conv": 4, "mixer": "mamba2"} | changes
    assert list(operators_of(config)) == expected
    for wrong in ("2", True, 0, None):
        with pytest.raises(InputError, match=rf"config says groups = {wrong!r}, expected a whole number of 1 or more"):
            list(operators_of(config | {"groups": wrong}))


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
