"""Timing, without a GPU: inputs, rivals, time limits, and what becomes of a rival that fails."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mdm.plugins.contract import SELECTIVE_SCAN, SSD_SCAN
from mdm.plugins.gpu.counts import CHIPS
from mdm.reference import scan
from mdm.tools.gpu_check import rivals, times
from mdm.tools.gpu_check.buffers import inputs_of
from mdm.tools.gpu_check.cases import COMPILED, MAMBA_SELECTIVE, MAMBA_SSD, Case, Goal, selective, ssd
from mdm.tools.gpu_check.measure import Time, time_of
from mdm.tools.gpu_check.runners import SourceRunner
from mdm.tools.gpu_check.verify import relative_error

SSD = Case(SSD_SCAN, "float32", ssd(2, 20, 4, 32, 16, G=2), has=7)
SELECTIVE = Case(SELECTIVE_SCAN, "float32", selective(2, 18, 32, G=2), has=7)


class Watch:
    """A stopwatch that runs the call, and says how many microseconds each took in turn."""

    def __init__(self, *microseconds: float) -> None:
        self._left = [*microseconds]

    def time(self, call: Callable[[], object]) -> Time:
        call()
        median = self._left.pop(0)
        return Time(median, median, median, 1)


def row(interpreter: SourceRunner, case: Case) -> times.Row:
    return times.time_ours(interpreter, CHIPS["H200"], Watch(10.0), case)  # type: ignore[arg-type]


def test_inputs_repeat_to_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "PATTERN", 7)
    given = times.inputs_on(SSD, "cpu")
    for spec in SSD.operator.present(SSD.has):
        value = given[spec.name]
        assert list(value.shape) == [SSD.sizes[letter] for letter in spec.dims]
        assert value.is_contiguous()
        if spec.dims.startswith("BL"):
            assert torch.equal(value[0, :7], value[1, 7:14])
            assert torch.equal(value[0, 14:], value[0, :6])
    assert times.inputs_on(Case(SSD_SCAN, "bfloat16", SSD.sizes, 15), "cpu")["mask"].dtype == torch.float32


def test_our_time_is_held_to_the_floor(interpreter: SourceRunner) -> None:
    made = row(interpreter, SSD)
    assert made.ours.median == 10.0
    assert made.times_floor == pytest.approx(10.0 / made.floor)
    assert made.does.launches == 1
    assert made.bandwidth_share == pytest.approx(made.must.moved / 10e-6 / CHIPS["H200"].bandwidth)


def fake_mamba(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    """A package mamba_ssm with this module alone."""
    parents = module.split(".")
    for end in range(len(parents)):
        monkeypatch.setitem(sys.modules, ".".join(parents[: end + 1]), types.ModuleType(module))
    made = sys.modules[module]
    for name, function in functions.items():
        setattr(made, name, function)
    monkeypatch.setattr(rivals, "find_spec", lambda name: types.SimpleNamespace(submodule_search_locations=None))


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """With mamba-ssm's layouts: channels before tokens, contiguous along the tokens."""
    assert delta_softplus
    assert all(v.is_contiguous() for v in (u, delta, B, C, z) if v is not None)
    ours = {"u": u.transpose(1, 2), "delta": delta.transpose(1, 2), "A": A, "D": D, "delta_bias": delta_bias}
    ours |= {"Bm": B.permute(0, 3, 1, 2), "C": C.permute(0, 3, 1, 2), "z": None if z is None else z.transpose(1, 2)}
    return scan.selective_scan(**ours).transpose(1, 2).contiguous()  # type: ignore[arg-type]


def test_mamba_selective_gets_its_layout(interpreter: SourceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mamba(monkeypatch, "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    made = row(interpreter, SELECTIVE)
    times.time_rival(interpreter, Watch(25.0), made, MAMBA_SELECTIVE, 60.0)  # type: ignore[arg-type]
    assert made.notes == {}
    assert made.faster_than(MAMBA_SELECTIVE) == 2.5
    [(call, to_ours)] = rivals.calls(SELECTIVE, inputs_of(SELECTIVE), MAMBA_SELECTIVE)
    assert relative_error(to_ours(call()), scan.selective_scan(**inputs_of(SELECTIVE)).double()) < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize(("wrong", "median"), [(None, 30.0), (128, 40.0), (256, 40.0)])
def test_the_faster_chunk_of_mamba_ssd_counts_if_it_is_right(
    wrong: int | None, median: float, interpreter: SourceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks = []

    def run(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int, dt_softplus: bool, **more: Any
    ) -> Tensor:
        chunks.append(chunk)
        return scan.ssd_scan(x, dt, A, B, C, **more) * (2 if chunk == wrong else 1)

    fake_mamba(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=run)
    made = row(interpreter, SSD)
    times.time_rival(interpreter, Watch(40.0, 30.0), made, MAMBA_SSD, 60.0)  # type: ignore[arg-type]
    assert made.rivals[MAMBA_SSD].median == median
    assert {*chunks} == {256, 128}
    assert made.notes.get(MAMBA_SSD, "").startswith("computes something else: off ours by 1") is (wrong is not None)


def test_compiled_is_the_chunked_form(interpreter: SourceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def keep(function: Any, dynamic: bool) -> Any:
        def call(**inputs: Any) -> Tensor:
            asked.append(inputs["chunk_size"])
            made: Tensor = function(**inputs)
            return made

        return call

    monkeypatch.setattr(torch, "compile", keep)
    for length in (20, 1064, 4494):
        case = Case(SSD_SCAN, "float32", SSD.sizes | {"L": length, "H": 2}, 0)  # type: ignore[operator]
        [(call, to_ours)] = rivals.calls(case, inputs_of(case), COMPILED)
        to_ours(call())
    assert asked == [64, 128, 512]


def test_a_rival_that_fails_is_noted(interpreter: SourceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    made = row(interpreter, SSD)
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    times.time_rival(interpreter, Watch(), made, MAMBA_SSD, 60.0)  # type: ignore[arg-type]
    assert made.notes[MAMBA_SSD] == "mamba-ssm is not installed"
    times.time_rival(interpreter, Watch(), made, MAMBA_SSD, -1.0)  # type: ignore[arg-type]
    assert made.notes[MAMBA_SSD] == "no time left"

    def broken(function: Any, dynamic: bool) -> Any:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(torch, "compile", broken)
    times.time_rival(interpreter, Watch(), made, COMPILED, 60.0)  # type: ignore[arg-type]
    assert made.notes[COMPILED] == "RuntimeError: no compiler found"
    assert made.rivals == {}


def test_a_rival_that_takes_too_long_is_stopped(interpreter: SourceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    made = row(interpreter, SSD)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda **inputs: time.sleep(60))
    times.time_rival(interpreter, Watch(), made, COMPILED, 0.2)  # type: ignore[arg-type]
    assert made.notes[COMPILED] == "TimeoutError: not ready after 0 seconds"
    time.sleep(0.25)  # no alarm is left behind


def test_goals_come_first_and_what_compiles_last(interpreter: SourceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Case, str]] = []
    monkeypatch.setattr(times, "TIMED", (SSD, SELECTIVE))
    monkeypatch.setattr(times, "GOALS", (Goal(SELECTIVE, 2.0, MAMBA_SELECTIVE, 1.3),))
    monkeypatch.setattr(times, "time_rival", lambda runner, watch, row, rival, left: seen.append((row.case, rival)))
    rows = times.time_all(interpreter, CHIPS["H200"], Watch(1.0, 2.0), lambda: 60.0, print)  # type: ignore[arg-type]
    assert [made.case for made in rows] == [SSD, SELECTIVE]
    assert seen == [(SELECTIVE, MAMBA_SELECTIVE), (SELECTIVE, COMPILED), (SSD, MAMBA_SSD), (SSD, COMPILED)]
    assert times.time_all(interpreter, CHIPS["H200"], Watch(), lambda: 1.0, print) == []  # type: ignore[arg-type]


def test_time_of() -> None:
    made = time_of([*map(float, range(1, 12))])
    assert (made.median, made.low, made.high, made.runs) == (6.0, 2.0, 10.0, 11)
