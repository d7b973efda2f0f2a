"""Every kernel against the float64 reference, in guarded memory; and from a captured graph, bit for bit the same."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from mdm.plugins.errors import EnvironmentLackError, MdmError
from mdm.plugins.gpu.pack import key_of
from mdm.plugins.gpu.torch_launch import LIMITS
from mdm.plugins.gpu.variants import Plan
from mdm.reference.scan import selective_scan, ssd_scan
from mdm.reference.short_conv import short_conv
from mdm.tools.gpu_check.buffers import ALONE, Guarded, absent_of, inputs_of, scratch_of, tensors
from mdm.tools.gpu_check.cases import Case, plans
from mdm.tools.gpu_check.runners import Runner

SMALL = 1 << 24  # multiply-adds up to which the CPU is through with the reference before a GPU has all its launches
CAPTURED_EVERY = 8  # cases
REFERENCES: dict[str, Callable[..., Tensor]] = {
    "ssd_scan": ssd_scan, "selective_scan": selective_scan, "short_conv": short_conv,
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    kernels: str
    case: str
    what: str


@dataclass
class Tally:
    """Of one kernel, type and image."""

    runs: int = 0
    worst: float = 0.0


@dataclass
class Verified:
    cases: int = 0
    runs: int = 0
    captured: int = 0
    late: int = 0  # cases for which no time was left
    tallies: dict[tuple[str, str, str], Tally] = field(default_factory=dict)  # by kernel, type, image
    images: dict[str, str] = field(default_factory=dict)  # of the kernels that ran
    faults: list[Fault] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # cases that could not be tried, and why
    left_out: dict[str, str] = field(default_factory=dict)  # kernels that this GPU does not run, and why
    untried: list[str] = field(default_factory=list)  # kernels that it may run, and did not
    broken: bool = False  # a launch failed, after which CUDA may not go on in this process

    @property
    def holds(self) -> bool:
        return bool(self.runs) and not self.faults and (not self.untried or bool(self.late))


def verify(
    runner: Runner,
    cases: Iterable[Case],
    kernels: frozenset[str],
    seconds_left: Callable[[], float],
    progress: Callable[[str], None] = lambda line: None,
) -> Verified:
    """Until time is up; `kernels` are those that must have run."""
    found = Verified()
    for index, case in enumerate(cases):
        if found.broken or seconds_left() < 0:
            found.late += 1
            continue
        # A capture wants memory from torch's pool.
        capture = runner.device == "cuda" and ALONE not in os.environ and index % CAPTURED_EVERY == 0
        _verify_case(runner, case, found, capture)
        if index % 50 == 0:
            progress(f"verify: {found.runs} runs of {found.cases} scans, {len(found.faults)} faults")
    found.untried = sorted(kernels - found.images.keys() - found.left_out.keys())
    return found


def _verify_case(runner: Runner, case: Case, found: Verified, capture: bool) -> None:
    try:
        given = inputs_of(case)
        inputs = {name: Guarded.holding(value, runner.device) for name, value in given.items()}
        absent = absent_of(case, runner.device)
        expected = reference(case, given, runner.device)
        own = runner.plan(case)
    except (MdmError, RuntimeError) as failure:  # no memory for its reference, among others
        found.skipped[str(case)] = " ".join(str(failure).split())[:300]
        return
    found.cases += 1
    for plan in (own, *(plan for plan in plans(case) if plan != own)):
        images = _prepare(runner, plan, found)
        if not images:
            continue
        y, scratch = Guarded(expected.shape, getattr(torch, case.dtype), runner.device), scratch_of(plan, runner.device)
        buffers = tensors(inputs | absent | scratch | {"y": y})
        faults: list[str] = []
        try:
            runner.launch(plan, buffers)
            error = relative_error(y.tensor, expected)
            if not error <= LIMITS[case.dtype]:
                faults.append(f"error {error:.3g}, at most {LIMITS[case.dtype]:.3g} expected")
            spoiled = {name: guarded.spoiled() for name, guarded in {**inputs, **scratch, "y": y}.items()}
            faults += [f"wrote to the guard of '{name}', {where}" for name, where in spoiled.items() if where]
            changed = [name for name, held in inputs.items() if not torch.equal(held.tensor.cpu(), given[name])]
            faults += [f"wrote to its input '{name}'" for name in changed]
            if capture and plan is own:
                faults += _replay(runner, plan, buffers, y)
                found.captured += 1
        except (MdmError, RuntimeError) as failure:
            faults.append(" ".join(str(failure).split())[:300])
            found.broken = True
        kernels = " + ".join(launch.variant.kernel for launch in plan.launches)
        found.faults += [Fault(kernels, str(case), what) for what in faults]
        if found.broken:
            return
        found.runs += 1
        found.images |= images
        for launch in plan.launches:
            kind = launch.variant.kernel, case.dtype, images[key_of(launch.variant)]
            tally = found.tallies.setdefault(kind, Tally())
            tally.runs, tally.worst = tally.runs + 1, max(tally.worst, math.inf if math.isnan(error) else error)


def _prepare(runner: Runner, plan: Plan, found: Verified) -> dict[str, str]:
    """The images of the plan's kernels; none where this GPU cannot run one of them."""
    images = {}
    for launch in plan.launches:
        key = key_of(launch.variant)
        try:
            images[key] = runner.prepare(launch.variant)
        except EnvironmentLackError as lack:
            found.left_out[key] = " ".join(str(lack).split())
            return {}
    return images


def _replay(runner: Runner, plan: Plan, buffers: Mapping[str, Tensor], y: Guarded) -> list[str]:
    """What differs between kernels launched one by one, a program's run, and that run captured and replayed."""
    direct = y.tensor.clone()
    graph = captured(lambda: runner.run(plan, buffers))
    faults = []
    for what, again in (("a run", lambda: runner.run(plan, buffers)), ("a replayed graph", graph.replay)):
        y.refill()
        again()
        if not torch.equal(y.tensor.view(torch.uint8), direct.view(torch.uint8)):
            faults.append(f"{what} gives other bits than its launches")
    return faults


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The launches of a call, which has run before: nothing may be compiled or loaded in a capture."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def reference(case: Case, given: Mapping[str, Tensor], device: str) -> Tensor:
    """y in float64, sample by sample: its intermediate results are large."""
    sizes = case.sizes
    multiply_adds = prod(given[case.operator.inputs[0].name].shape) * (sizes.get("N") or sizes["K"])
    where = "cpu" if multiply_adds <= SMALL else device
    exact = {name: value.to(where).double() for name, value in given.items()}
    per_sample = {spec.name for spec in case.operator.present(case.has) if spec.dims.startswith("B")}
    function = REFERENCES[case.operator.torch_name]
    return torch.cat(
        [
            function(**{name: value[i : i + 1] if name in per_sample else value for name, value in exact.items()})
            for i in range(sizes["B"])
        ]
    )


def relative_error(y: Tensor, expected: Tensor) -> float:
    """max |error| / max |value|."""
    error, largest = (float(v.abs().max()) for v in (y.to(expected.device).double() - expected, expected))
    return error / largest if largest else error and math.inf
