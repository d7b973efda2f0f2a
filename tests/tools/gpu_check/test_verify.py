"""`verify` with Triton's interpreter for a GPU: what is right passes, and what is planted is found and named."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from mdm.plugins.contract import SELECTIVE_SCAN, SSD_SCAN
from mdm.plugins.errors import EngineError, EnvironmentLackError
from mdm.plugins.gpu.pack import key_of
from mdm.plugins.gpu.torch_launch import LIMITS
from mdm.plugins.gpu.variants import Plan, Variant
from mdm.tools.gpu_check import verify
from mdm.tools.gpu_check.buffers import GUARD, Guarded
from mdm.tools.gpu_check.cases import Case, selective, ssd
from mdm.tools.gpu_check.runners import Buffers, SourceRunner

SSD = Case(SSD_SCAN, "bfloat16", ssd(1, 20, 2, 32, 16), has=2)
SELECTIVE = Case(SELECTIVE_SCAN, "float32", selective(2, 18, 48), has=5)


def check(runner: SourceRunner, *cases: Case, kernels: frozenset[str] = frozenset()) -> verify.Verified:
    return verify.verify(runner, cases, kernels, seconds_left=lambda: 1.0)


def test_the_kernels_are_right(interpreter: SourceRunner) -> None:
    found = check(interpreter, SSD, SELECTIVE)
    assert found.faults == []
    assert found.holds
    assert (found.cases, found.late) == (2, 0)
    assert found.runs == 2  # chunks of other architectures are not this one's
    assert set(found.tallies) == {("ssd_scan", "bfloat16", "source"), ("selective_scan", "float32", "source")}
    assert all(0 < tally.worst <= LIMITS[dtype] for (_, dtype, _), tally in found.tallies.items())
    assert [key.split()[:2] for key in found.left_out] == [["ssd_scan", "bfloat16"]]


@pytest.mark.usefixtures("short_segments")
def test_segments_are_right(interpreter: SourceRunner) -> None:
    found = check(interpreter, Case(SELECTIVE_SCAN, "float16", selective(1, 33, 16), has=15, decay="strong"))
    assert found.faults == []
    assert {kernel for kernel, _, _ in found.tallies} == {"selective_segment_states", "carry_states", "selective_scan"}
    assert found.runs == 2  # cut, and whole


Spoil = Callable[[Plan, Mapping[str, Tensor]], None]


def planted(runner: SourceRunner, spoil: Spoil, first: bool = False) -> SourceRunner:
    """The runner with something done to the buffers before or behind each plan."""
    launch = runner.launch

    def spoiled(plan: Plan, buffers: Buffers) -> None:
        if first:
            spoil(plan, buffers)
        launch(plan, buffers)
        if not first:
            spoil(plan, buffers)

    runner.launch = spoiled  # type: ignore[method-assign]
    return runner


def one_element(plan: Plan, buffers: Mapping[str, Tensor]) -> None:
    buffers["y"].view(-1)[7] += buffers["y"].float().abs().max() / 64


def not_written(plan: Plan, buffers: Mapping[str, Tensor]) -> None:
    buffers["y"].view(-1)[-1] = torch.nan


def reads_absent_D(plan: Plan, buffers: Mapping[str, Tensor]) -> None:
    buffers["y"][0, 3] += buffers["D"][0]


def one_past_the_end(plan: Plan, buffers: Mapping[str, Tensor]) -> None:
    y = buffers["y"]
    y.as_strided((1,), (1,), y.storage_offset() + y.numel())[0] = 0


def one_before_the_start(plan: Plan, buffers: Mapping[str, Tensor]) -> None:
    y = buffers["y"]
    y.as_strided((1,), (1,), y.storage_offset() - 1)[0] = 0


def writes_to_an_input(plan: Plan, buffers: Mapping[str, Tensor]) -> None:
    buffers["x"].view(-1)[3] = 0


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (writes_to_an_input, r"wrote to its input 'x'"),
        (one_element, r"error 0\.01\d*, at most 0\.00781 expected"),
        (not_written, r"error nan, at most"),
        (reads_absent_D, r"error nan, at most"),
        (one_past_the_end, r"wrote to the guard of 'y', 0 bytes behind its end"),
        (one_before_the_start, r"wrote to the guard of 'y', 2 bytes before its start"),
    ],
)
def test_a_planted_fault_is_told(interpreter: SourceRunner, spoil: Spoil, said: str) -> None:
    found = check(planted(interpreter, spoil), SSD)
    assert not found.holds
    [fault] = found.faults
    assert (fault.kernels, fault.case) == ("ssd_scan", "ssd_scan bfloat16 B1 L20 H2 P32 G1 N16 has2 typical")
    assert re.match(said, fault.what)
    [tally] = found.tallies.values()
    assert (tally.worst > LIMITS["bfloat16"]) is ("error" in said)


@pytest.mark.usefixtures("short_segments")
def test_a_write_beyond_scratch_is_told(interpreter: SourceRunner) -> None:
    def beyond(plan: Plan, buffers: Mapping[str, Tensor]) -> None:
        if "step_sums" in plan.scratch:
            one_past_the_end(plan, {"y": buffers["step_sums"]})

    found = check(planted(interpreter, beyond, first=True), Case(SELECTIVE_SCAN, "float32", selective(1, 33, 16), 0))
    [fault] = found.faults
    assert fault.what == "wrote to the guard of 'step_sums', 0 bytes behind its end"
    assert fault.kernels == "selective_segment_states + carry_states + selective_scan"


def test_a_failed_launch_ends_it(interpreter: SourceRunner) -> None:
    def fail(plan: Plan, buffers: Mapping[str, Tensor]) -> None:
        raise EngineError("the kernel 'ssd_scan' failed to launch\nCUDA_ERROR_ILLEGAL_ADDRESS")

    found = check(planted(interpreter, fail), SSD, SELECTIVE)
    assert (found.broken, found.holds, found.late) == (True, False, 1)
    assert found.faults[0].what == "the kernel 'ssd_scan' failed to launch CUDA_ERROR_ILLEGAL_ADDRESS"


def test_time_is_up(interpreter: SourceRunner) -> None:
    found = verify.verify(interpreter, [SSD, SSD], interpreter.kernels, seconds_left=lambda: -1.0)
    assert (found.late, found.cases, found.holds) == (2, 0, False)
    assert found.untried == sorted(interpreter.kernels)


def test_a_kernel_that_never_ran_is_a_fault(interpreter: SourceRunner) -> None:
    [ran] = check(interpreter, SELECTIVE).images
    assert check(interpreter, SELECTIVE, kernels=frozenset({ran})).holds
    found = check(interpreter, SELECTIVE, kernels=frozenset({ran, "another"}))
    assert (found.untried, found.holds) == (["another"], False)


def test_what_the_gpu_cannot_run_is_left_out(interpreter: SourceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(variant: Variant) -> str:
        raise EnvironmentLackError("needs more shared memory\nfound 1, expected 2")

    monkeypatch.setattr(interpreter, "prepare", prepare)
    key = key_of(interpreter.plan(SELECTIVE).launches[0].variant)
    found = check(interpreter, SELECTIVE, kernels=frozenset({key}))
    assert found.left_out == {key: "needs more shared memory found 1, expected 2"}
    assert (found.runs, found.untried, found.holds) == (0, [], False)


class Graph:
    """Of launches that are kept and run again."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self.replay = replay


def test_a_graph_that_differs_is_told(interpreter: SourceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, with a capture that only keeps the call; the first run is right, the replay is not."""
    y = Guarded((4,), torch.float16, "cpu")
    values = iter((1.0, 2.0))
    monkeypatch.setattr(interpreter, "run", lambda plan, buffers: buffers["y"].fill_(next(values)))
    monkeypatch.setattr(verify, "captured", Graph)
    y.tensor.fill_(1.0)
    plan = interpreter.plan(SSD)
    assert verify._replay(interpreter, plan, {"y": y.tensor}, y) == [
        "a replayed graph gives other bits than its launches"
    ]


def test_the_reference_is_taken_sample_by_sample() -> None:
    from mdm.reference import scan
    from mdm.tools.gpu_check.buffers import inputs_of

    case = Case(SSD_SCAN, "float32", ssd(3, 9, 2, 32, 16), has=15)
    given = inputs_of(case)
    whole = scan.ssd_scan(**{name: value.double() for name, value in given.items()}, naive=True)  # type: ignore[arg-type]
    assert verify.relative_error(verify.reference(case, given, "cpu"), whole) < 1e-12


def test_what_cannot_be_tried_is_told_and_the_rest_goes_on(
    interpreter: SourceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = verify.reference

    def none_left(case: Case, *more: object) -> Tensor:
        if case is SSD:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return reference(case, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(verify, "reference", none_left)
    found = check(interpreter, SSD, SELECTIVE)
    assert found.skipped == {str(SSD): "CUDA out of memory"}
    assert (found.cases, found.holds) == (1, True)


def test_guards_are_nan_and_stay() -> None:
    guarded = Guarded.holding(torch.arange(6.0).view(2, 3), "cpu")
    assert guarded.spoiled() == ""
    behind = guarded.tensor.as_strided((GUARD // 4,), (1,), guarded.tensor.storage_offset() + 6)
    assert behind.isnan().all()
    behind[-1] = 0
    assert guarded.spoiled() == f"{GUARD - 4} bytes behind its end"
    assert guarded.tensor.data_ptr() % 16 == 0
