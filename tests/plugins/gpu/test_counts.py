"""The counts: by hand where sizes are small, and held to all that the kernels do in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from mdm.plugins.contract import ACTIVATIONS, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, Operator
from mdm.plugins.gpu import torch_launch
from mdm.plugins.gpu.counts import CHIPS, Work, done, floor, least_time, least_times, work_of
from mdm.plugins.gpu.variants import Plan, choose

SSD = {"B": 2, "L": 1064, "H": 64, "P": 64, "G": 1, "N": 128}
SELECTIVE = {"B": 2, "L": 4494, "D": 3072, "G": 1, "N": 16}


@dataclasses.dataclass
class Seen:
    """What the interpreter did in one launch."""

    loaded: int = 0
    products: int = 0
    specials: int = 0
    adds: int = 0
    multiplies: int = 0
    read: dict[int, int] = dataclasses.field(default_factory=dict)  # address: bytes
    written: dict[int, int] = dataclasses.field(default_factory=dict)


@contextmanager
def watched() -> Iterator[Seen]:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    torch_launch._mend_interpreter()  # not later, between the two lines that put the methods back
    names = ("create_masked_load", "create_masked_store", "binary_op", "unary_op", "create_dot")
    kept = {name: getattr(Builder, name) for name in names}
    seen = Seen()

    def addresses(pointers: Any, mask: Any) -> dict[int, int]:
        """Threads that ask for the same bytes get them at once."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        return dict.fromkeys(np.broadcast_to(pointers.data, mask.data.shape)[mask.data].tolist(), size)

    def load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        found = addresses(pointers, mask)
        seen.loaded += sum(found.values())
        seen.read.update(found)
        return kept["create_masked_load"](self, pointers, mask, *more)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        seen.written.update(addresses(pointers, mask))
        return kept["create_masked_store"](self, pointers, value, mask, *more)

    def binary(self: Any, a: Any, b: Any, how: Any) -> Any:
        made = kept["binary_op"](self, a, b, how)
        if a.dtype.scalar == tl.float32:
            seen.adds += made.data.size * (how in (np.add, np.subtract))
            seen.multiplies += made.data.size * (how is np.multiply)
            seen.specials += made.data.size * (how is np.divide)
        return made

    def unary(self: Any, a: Any, how: Any) -> Any:
        seen.specials += a.data.size * (how is np.exp2)
        return kept["unary_op"](self, a, how)

    def dot(self: Any, a: Any, b: Any, *more: Any) -> Any:
        seen.products += a.data.size * b.data.shape[-1]
        return kept["create_dot"](self, a, b, *more)

    try:
        for name, method in zip(names, (load, store, binary, unary, dot), strict=True):
            setattr(Builder, name, method)
        yield seen
    finally:
        for name, method in kept.items():
            setattr(Builder, name, method)


def hold_launches(plan: Plan, inputs: Mapping[str, Any], y: Any) -> list[str]:
    """Run a plan's launches, each against its count -> the kernels."""
    import torch

    scratch = {name: torch.zeros(shape) for name, shape in plan.scratch.items()}
    for launch in plan.launches:
        with watched() as seen:
            torch_launch.run_launch(launch, {**inputs, **scratch, "y": y})
        work, full = work_of(launch), launch.variant.dtype == "float32"
        assert seen.loaded == work.loaded
        assert sum(seen.read.values()) == work.read
        assert sum(seen.written.values()) == work.written
        assert seen.specials == work.specials
        assert work.products == (0 if full else seen.products)
        # How many additions join a multiplication before them, the compiler decides. Sums over threads are not seen.
        operations = work.operations - (seen.products if full else 0)
        assert 0.9 * max(seen.adds, seen.multiplies) <= operations <= seen.adds + seen.multiplies
    return [launch.variant.kernel for launch in plan.launches]


SOME_SSD = {"B": 2, "L": 40, "H": 4, "P": 64, "G": 2, "N": 32}
SOME_SELECTIVE = {"B": 2, "L": 33, "D": 96, "G": 2, "N": 16}


@pytest.mark.parametrize(
    ("operator", "sizes", "dtype", "has", "gpu"),
    [
        (SSD_SCAN, SOME_SSD, "bfloat16", 15, {}),
        (SSD_SCAN, SOME_SSD, "float16", 0, {"capability": (8, 0)}),
        (SSD_SCAN, SOME_SSD | {"N": 128, "H": 2}, "float32", 5, {}),
        (SSD_SCAN, SOME_SSD, "bfloat16", 10, {"multiprocessors": 1}),
        (SELECTIVE_SCAN, SOME_SELECTIVE, "bfloat16", 15, {}),
        (SELECTIVE_SCAN, SOME_SELECTIVE | {"G": 1, "D": 48}, "float32", 0, {}),
        (SHORT_CONV, {"B": 2, "L": 37, "D": 144, "K": 4}, "bfloat16", 1, {}),
        (SHORT_CONV, {"B": 1, "L": 2, "D": 16, "K": 3}, "float32", 0, {}),
    ],
)
def test_a_launch_does_what_is_counted(
    make: Any, operator: Operator, sizes: dict[str, int], dtype: str, has: int, gpu: dict[str, Any]
) -> None:
    inputs = make(operator, sizes, has, dtype)
    plan = torch_launch.plan_of(operator, inputs, **gpu)
    kernels = hold_launches(plan, inputs, inputs[operator.inputs[0].name].clone())
    assert kernels == [f"{operator.torch_name}"]


@pytest.mark.parametrize(
    ("operator", "sizes", "dtype", "has"),
    [
        (SSD_SCAN, SOME_SSD | {"N": 128, "H": 2}, "float32", 15),
        (SSD_SCAN, SOME_SSD, "bfloat16", 4),
        (SELECTIVE_SCAN, SOME_SELECTIVE, "float16", 15),
        (SELECTIVE_SCAN, SOME_SELECTIVE | {"G": 1, "D": 48}, "float32", 0),
    ],
)
@pytest.mark.usefixtures("short_segments")
def test_segments_do_what_is_counted(
    make: Any, operator: Operator, sizes: dict[str, int], dtype: str, has: int
) -> None:
    inputs = make(operator, sizes, has, dtype)
    plan = torch_launch.plan_of(operator, inputs)
    kernels = hold_launches(plan, inputs, inputs[operator.inputs[0].name].clone())
    assert kernels == [
        f"{operator.torch_name.removesuffix('_scan')}_segment_states",
        "carry_states",
        operator.torch_name,
    ]


def test_floor_by_hand() -> None:
    """One sample of 3 tokens, 2 heads of 32 or 32 channels, in bfloat16, with D and z."""
    ssd = floor(SSD_SCAN, "bfloat16", {"B": 1, "L": 3, "H": 2, "P": 32, "G": 1, "N": 16}, 3)
    assert ssd == Work(
        read=2 * (192 + 6 + 48 + 48 + 192) + 4 * (2 + 2),  # x, dt, Bm, C, z; A, D
        written=2 * 192,
        loaded=2 * (192 + 6 + 48 + 48 + 192) + 4 * (2 + 2),
        products=2 * 16 * 192,
        operations=2 * 192,  # skip and gate
        specials=6 + 6 + 192,  # decay, softplus, silu
    )
    selective = floor(SELECTIVE_SCAN, "float32", {"B": 1, "L": 3, "D": 32, "G": 1, "N": 16}, 0)
    assert selective == Work(
        read=4 * (96 + 96 + 512 + 48 + 48), written=4 * 96, loaded=4 * (96 + 96 + 512 + 48 + 48),
        operations=96 * (4 * 16 + 1), specials=96 * 17,
    )  # fmt: skip
    conv = floor(SHORT_CONV, "float16", {"B": 1, "L": 3, "D": 32, "K": 4}, 1)
    assert conv == Work(
        read=2 * 96 + 4 * (128 + 32), written=2 * 96, loaded=2 * 96 + 4 * (128 + 32), operations=96 * 7, specials=96
    )


def test_float32_has_no_matrix_units() -> None:
    half, full = (floor(SSD_SCAN, dtype, SSD, 0) for dtype in ("bfloat16", "float32"))
    assert (full.products, full.operations) == (0, half.products)
    assert done(choose(SSD_SCAN, "float32", SSD, 0, 132, (9, 0))).products == 0


@pytest.mark.parametrize(("operator", "sizes"), [(SSD_SCAN, SSD), (SELECTIVE_SCAN, SELECTIVE)])
def test_nothing_to_do(operator: Operator, sizes: dict[str, int]) -> None:
    nothing = sizes | {"L": 0}
    assert floor(operator, "float16", nothing, 15) == done(choose(operator, "float16", nothing, 15, 132, (9, 0)))


SHAPES = st.fixed_dictionaries(
    {
        "B": st.integers(1, 9),
        "L": st.integers(1, 20_000),
        "H": st.sampled_from([2, 16, 24, 128]),
        "P": st.sampled_from([32, 64, 96, 128]),
        "G": st.sampled_from([1, 2]),
    }
)


@settings(deadline=None)
@given(
    SHAPES, st.sampled_from(ACTIVATIONS), st.sampled_from([16, 32, 64, 128]), st.integers(0, 15), st.sampled_from("BLH")
)
def test_no_plan_beats_the_floor_and_more_takes_more(
    shape: dict[str, int], dtype: str, N: int, has: int, letter: str
) -> None:
    for operator, states in ((SSD_SCAN, N), (SELECTIVE_SCAN, 16), (SHORT_CONV, 0)):
        has &= operator.has_all
        sizes, larger = (
            made | {"N": states, "K": 4, "D": made["H"] * made["P"]}
            for made in (shape, shape | {letter: 2 * shape[letter]})
        )
        least = floor(operator, dtype, sizes, has)
        assert_at_most(least, floor(operator, dtype, larger, has))
        # A chip of one multiprocessor cuts nothing into segments, which would be another trade.
        assert_at_most(*(done(choose(operator, dtype, s, has, 1, (9, 0))) for s in (sizes, larger)))
        for chip in CHIPS.values():
            plan = choose(operator, dtype, sizes, has, chip.multiprocessors, chip.capability)
            work = done(plan)
            assert work.launches == len(plan.launches)
            assert work.loaded >= work.read
            assert_at_most(least, work)
            assert least_time(least, chip)[0] <= least_time(work, chip)[0]


def assert_at_most(few: Work, many: Work) -> None:
    for part, count in dataclasses.asdict(few).items():
        assert count <= getattr(many, part), part


def test_what_binds_on_an_h200() -> None:
    """By hand: 36.2 MB in and 17.4 MB out at 4.8 TB/s; 2 * 4494 * 3072 * (16 + 2) results, 132 * 16 a clock."""
    h200 = CHIPS["H200"]
    seconds, binding = least_time(floor(SSD_SCAN, "bfloat16", SSD, 7), h200)
    assert binding == "memory"
    assert seconds == pytest.approx(53.66e6 / 4.8e12, rel=1e-3)
    seconds, binding = least_time(floor(SELECTIVE_SCAN, "bfloat16", SELECTIVE, 7), h200)
    assert binding == "special"
    assert seconds == pytest.approx(2 * 4494 * 3072 * 18 / (132 * 16 * 1.98e9), rel=1e-9)


def test_each_part_of_a_chip_can_bind() -> None:
    h200 = CHIPS["H200"]
    for part, work in {
        "memory": Work(read=10**12), "matrix": Work(products=10**16), "float32": Work(operations=10**15),
        "special": Work(specials=10**14),
    }.items():  # fmt: skip
        assert least_time(work, h200) == (least_times(work, h200)[part], part)
        assert least_time(work, h200)[0] > 0


def test_chips_fit_their_own_clock() -> None:
    """128 float32 lanes a multiprocessor, 64 for 8.0: operations and specials come from different figures."""
    for chip in CHIPS.values():
        lanes = 64 if chip.capability == (8, 0) else 128
        assert chip.operations == pytest.approx(chip.specials / 16 * lanes, rel=0.01)
