"""The times: ours, the rivals', and the counted floor with the ceilings that this chip reached."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

import torch
from torch import Tensor

from mdm.plugins.errors import EnvironmentLackError, MdmError
from mdm.plugins.gpu.counts import Chip, Work, done, floor, least_time
from mdm.tools.bench.operator_inputs import operator_inputs
from mdm.tools.gpu_check.cases import COMPILED, GOALS, TIMED, Case
from mdm.tools.gpu_check.measure import Stopwatch, Time
from mdm.tools.gpu_check.rivals import calls, rivals_of
from mdm.tools.gpu_check.runners import Runner
from mdm.tools.gpu_check.verify import relative_error

PATTERN = 509  # tokens that are made; they repeat along a longer sequence, and for every sample
ALIKE = 0.03  # how far a rival may be off ours, of max |error| / max |value|: bfloat16 throughout
WAIT = 150.0  # seconds for a rival to compile and tune itself for one case
RESERVE = 15.0  # seconds kept for what comes behind
NO_TIME = "no time left"


@dataclass(frozen=True)
class Row:
    """One case."""

    case: Case
    ours: Time
    must: Work
    does: Work
    floor: float  # microseconds
    binding: str  # the part of the chip that the floor comes from
    bandwidth_share: float  # of the measured ceiling, by the bytes that must move
    products_share: float
    rivals: dict[str, Time] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # by rival: why it has no time, or how it is off

    @property
    def times_floor(self) -> float:
        return self.ours.median / self.floor

    def faster_than(self, rival: str) -> float | None:
        return self.rivals[rival].median / self.ours.median if rival in self.rivals else None


def time_all(
    runner: Runner, chip: Chip, watch: Stopwatch, seconds_left: Callable[[], float], progress: Callable[[str], None]
) -> list[Row]:
    """Every case; then the rivals of those with a goal, then the others', the form that compiles for a minute last."""
    rows = []
    for case in TIMED:
        if seconds_left() > RESERVE:
            progress(f"times: {case}")
            try:
                rows.append(time_ours(runner, chip, watch, case))
            except (MdmError, RuntimeError) as failure:  # no memory for it, among others: the other times are not lost
                progress(f"not timed: {' '.join(str(failure).split()):.200}")
    with_goal = [goal.case for goal in GOALS]
    waiting = [(row, rival) for row in rows for rival in rivals_of(row.case)]
    waiting.sort(key=lambda pair: (pair[0].case not in with_goal, pair[1] == COMPILED))
    for row, rival in waiting:
        progress(f"times: {rival}, {row.case}")
        time_rival(runner, watch, row, rival, min(WAIT, seconds_left() - RESERVE))
    return rows


def time_ours(runner: Runner, chip: Chip, watch: Stopwatch, case: Case) -> Row:
    call, _ = ours(runner, case)
    call()
    time = watch.time(call)
    must, does = floor(case.operator, case.dtype, case.sizes, case.has), done(runner.plan(case))
    least, binding = least_time(must, chip)
    seconds = time.median / 1e6
    return Row(
        case, time, must, does, 1e6 * least, binding,
        bandwidth_share=must.moved / seconds / chip.bandwidth, products_share=must.products / seconds / chip.products,
    )  # fmt: skip


def time_rival(runner: Runner, watch: Stopwatch, row: Row, name: str, seconds: float) -> None:
    """Its fastest way into the row, or a note."""
    if seconds < 0:
        row.notes[name] = NO_TIME
        return
    try:
        call, expected = ours(runner, row.case)
        call()
        with torch.no_grad(), time_limit(seconds):
            for other, to_ours in calls(row.case, inputs_on(row.case, runner.device), name):
                off = relative_error(to_ours(other()), expected.double())
                if not off <= ALIKE:
                    row.notes[name] = f"computes something else: off ours by {off:.2g}"
                    continue
                time = watch.time(other)
                if name not in row.rivals or time.median < row.rivals[name].median:
                    row.rivals[name] = time
    except EnvironmentLackError as lack:
        row.notes[name] = " ".join(str(lack).split())
    # Whatever a rival may raise, the other times are not lost.
    except Exception as error:
        row.notes[name] = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def ours(runner: Runner, case: Case) -> tuple[Callable[[], None], Tensor]:
    """A call, and the y it writes to."""
    plan, given = runner.plan(case), inputs_on(case, runner.device)
    for launch in plan.launches:
        runner.prepare(launch.variant)
    y = torch.empty_like(given[case.operator.inputs[0].name])
    scratch = {name: torch.empty(shape, device=runner.device) for name, shape in plan.scratch.items()}
    buffers = {**given, **scratch, "y": y}
    return lambda: runner.run(plan, buffers), y


def inputs_on(case: Case, device: str) -> dict[str, Tensor]:
    B, L = case.sizes["B"], case.sizes["L"]
    tokens = min(L, PATTERN)
    arrays = operator_inputs(case.operator, {**case.sizes, "B": 1, "L": tokens}, case.has)
    made = {}
    for spec in case.operator.present(case.has):
        value = torch.from_numpy(arrays[spec.name]).to(
            device, getattr(torch, case.dtype if spec.activation else "float32")
        )
        if spec.dims.startswith("BL"):
            value = value.repeat(B, -(-L // tokens), *[1] * (value.dim() - 2))[:, :L].contiguous()
        made[spec.name] = value
    return made


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what runs longer, between two of its steps in Python."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
