"""What is tried reaches every kernel there is, and every kind of input."""

from __future__ import annotations

import itertools

from mdm.plugins.contract import ACTIVATIONS, SCANS, SHORT_CONV, SSD_SCAN
from mdm.plugins.gpu.pack import key_of
from mdm.plugins.gpu.variants import SSD_STATES, variants
from mdm.tools.bench.operator_inputs import DECAYS
from mdm.tools.gpu_check.cases import GOALS, TIMED, named, plans, small


def test_every_kernel_is_tried_in_every_type() -> None:
    """By the small ones alone, which the sanitizer draws from; whole sequences and cut ones."""
    runs = [(case, plan) for case in small() for plan in plans(case)]
    assert {key_of(launch.variant) for _, plan in runs for launch in plan.launches} == {*map(key_of, variants())}
    cut = {(case.operator.name, case.dtype, len(plan.launches)) for case, plan in runs}
    scans = itertools.product((operator.name for operator in SCANS), ACTIVATIONS, (1, 3))
    assert cut == {*scans} | {(SHORT_CONV.name, dtype, 1) for dtype in ACTIVATIONS}
    assert len(runs) < 2000


def test_every_input_is_tried() -> None:
    cases = small()
    assert len(set(map(str, cases))) == len(cases)
    kinds = {(case.dtype, case.sizes["N"], case.has) for case in cases if case.operator is SSD_SCAN}
    assert kinds == {*itertools.product(ACTIVATIONS, SSD_STATES, range(16))}
    assert {case.decay for case in cases} == {*DECAYS}
    for letter, values in {"B": {1, 2, 3}, "G": {1, 2}}.items():
        assert {case.sizes[letter] for case in cases if letter in case.sizes} == values
    for case in cases:
        case.operator.check({spec.name: [case.sizes[letter] for letter in spec.dims] for spec in case.operator.inputs})


def test_some_are_a_sample_of_all() -> None:
    everything = {*map(str, small())}
    some = [*map(str, small(40))]
    assert len(set(some)) == 40
    assert {*some} < everything
    assert len(small(10**6)) == len(everything)


def test_goals_are_tried_and_timed() -> None:
    for goal in GOALS:
        assert goal.case in TIMED
        assert goal.case in named()
    sizes = [case.sizes for case in named()]
    assert all(case.sizes in sizes for case in TIMED)
