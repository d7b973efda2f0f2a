"""The first node of a graph that computes something else than the model.

The blueprint is the graph as the exporter draws it, right by construction; the file is the bundle's graph, on a
backend. The file is run once as a whole with a probe behind each part (errors as they grow), then part by part from
true inputs (errors of its own). The first part that leaves its limit is run node by node, again from true inputs: the
first node that leaves its limit is the one. Truth is the blueprint in float64, floor is the blueprint in the graph's
own types.

Memory: the tensors that are live between two parts, and one part's own.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from mdm.plugins.errors import EngineError, EnvironmentLackError, InputError
from mdm.tools.check.finding import Array, Difference, Limits
from mdm.tools.check.limits import Multiples, steadied
from mdm.tools.check.nodes.evaluator import Evaluation
from mdm.tools.check.nodes.parts import Part, parts_of
from mdm.tools.check.nodes.replay import EQUAL, compare
from mdm.tools.check.nodes.submodel import Run, SubModel, cut_out, weights_through, with_probes, write_case
from mdm.tools.check.nodes.wiring import DECIDE, FLOATS, Pair, Pairing, Wiring, operator_of
from mdm.tools.check.report import BlockErrors, Divergence

Values = Callable[[str], Tensor]
Live = dict[str, Tensor]


def bisect(
    graph_name: str,
    file: ModelProto,
    blueprint: ModelProto,
    values: Values,
    inputs: Mapping[str, Array],
    run: Run,
    multiples: Multiples,
    folder: Path | None = None,
) -> tuple[BlockErrors, Divergence | None]:
    """`values`: weights as the checkpoint has them; `run`: any model on the backend; `folder`: for the sub-model."""
    return Bisection(graph_name, file, blueprint, values, inputs, run, multiples, folder).result()


@dataclass(frozen=True)
class Judged:
    """One tensor against the truth."""

    tensor: str
    dtype: str
    error: Difference
    floor: Difference
    limits: Limits
    truth: Array
    found_shape: tuple[int, ...]

    @property
    def used(self) -> float:
        return self.limits.used(self.error)


@dataclass
class Stretch:
    """Pairs start .. end, from true inputs."""

    start: int
    end: int
    outputs: list[Judged] = field(default_factory=list)
    next: Live = field(default_factory=dict)  # what the truth goes on with
    model: SubModel | None = None
    failure: str = ""  # the backend's words, where it cannot run it

    @property
    def worst(self) -> Judged | None:
        return max(self.outputs, key=lambda one: one.used, default=None)

    @property
    def off(self) -> bool:
        return bool(self.failure) or (self.worst is not None and self.worst.used > 1)


class Bisection:
    def __init__(
        self, graph_name: str, file: ModelProto, blueprint: ModelProto, values: Values, inputs: Mapping[str, Array],
        run: Run, multiples: Multiples, folder: Path | None,
    ) -> None:  # fmt: skip
        self.name, self.inputs, self.run, self.multiples, self.folder = graph_name, inputs, run, multiples, folder
        self.file, self.drawn = Wiring(file), Wiring(blueprint)
        if set(self.file.inputs) != set(inputs):
            raise InputError(
                f"graph '{graph_name}' takes {', '.join(self.file.inputs)}\nthe blueprint takes {', '.join(inputs)}"
            )
        pairing = self.pairing = Pairing(self.file, self.drawn)
        self.pairs, self.key, self.last_use = pairing.pairs, pairing.key, pairing.last_use
        self.parts = parts_of([pair.name for pair in self.pairs], [self.op_of(pair) for pair in self.pairs])
        self.exact, self.deployed = (Evaluation(blueprint, values, exact) for exact in (True, False))
        self.theirs_exact, self.theirs_deployed = (Evaluation(file, self.file_value, exact) for exact in (True, False))
        self.used_in_file = {name: place for place, pair in enumerate(self.pairs) for name in self.taken([pair])}
        self.probes = [self.probe_of(part) for part in self.parts]

    def result(self) -> tuple[BlockErrors, Divergence | None]:
        whole, failure = self.run_whole()
        free = {True: self.exact.given(self.inputs), False: self.deployed.given(self.inputs)}
        truth = self.deployed.given(self.inputs)
        errors = BlockErrors(self.name, [part.name for part in self.parts], [], [], [], [])
        divergence: Divergence | None = None
        grown: list[Judged | None] = []
        for part, probe in zip(self.parts, self.probes, strict=True):
            grown.append(self.grown(part, probe, whole, free))
            own = self.judge(part.start, part.end, truth)
            errors.own.append(own.worst.error.rms if own.worst else 0.0)
            errors.own_floor.append(own.worst.floor.rms if own.worst else 0.0)
            if own.off and divergence is None:
                divergence = self.drill(part, own, truth)
            truth = {k: x for k, x in (truth | own.next).items() if self.last_use.get(k, -1) >= part.end}
        for one, probe in zip(grown, self.probes, strict=True):
            errors.grown.append(one.error.rms if one else float("nan") if probe and failure else 0.0)
            errors.grown_floor.append(one.floor.rms if one else 0.0)
        return errors, divergence or self.together(grown, failure)

    # ------------------------------------------------------------------------------------ the whole graph, running free

    def run_whole(self) -> tuple[dict[str, Array], str]:
        probes = with_probes(self.file, list(dict.fromkeys(p for p in self.probes if p)), dict(self.inputs))
        try:
            return probes.run(self.run), ""
        except (EngineError, EnvironmentLackError) as error:
            return {}, str(error)

    def grown(self, part: Part, probe: str, whole: Mapping[str, Array], free: dict[bool, Live]) -> Judged | None:
        """Moves both free evaluations behind this part."""
        numbers = self.drawn.with_fixed(p.drawn for p in self.pairs[part.start : part.end] if p.drawn is not None)
        later = {name for name, place in self.last_use.items() if place >= part.end}
        key = self.key.get(probe, "")
        for exact, evaluation in ((True, self.exact), (False, self.deployed)):
            evaluation.advance(free[exact], numbers, later | {key})
        judged = None
        if probe in whole:
            judged = self.judged(probe, whole[probe], free[True][key], free[False][key])
        for live in free.values():
            if key not in later:
                live.pop(key, None)
        return judged

    def probe_of(self, part: Part) -> str:
        """The last float tensor of a part that goes on, where the blueprint has it too. Empty where there is none."""
        for pair in reversed(self.pairs[part.start : part.end]):
            if pair.file is not None and pair.drawn is not None:
                for name in map(str, self.file.nodes[pair.file].output):
                    goes_on = self.used_in_file.get(name, -1) >= part.end or name in self.file.outputs
                    if goes_on and self.file.types[name] in FLOATS:
                        return name
        return ""

    def together(self, grown: list[Judged | None], failure: str) -> Divergence | None:
        """No part is off alone. Is the whole?"""
        if failure:
            return self.told("", "", "", None, [], f"runs in parts, but not as a whole: {failure}")
        decided: set[str] = set()  # what a near tie may change: errors grow there beyond any limit, rightly
        for number, node in enumerate(self.drawn.nodes):
            if node.op_type in DECIDE or decided.intersection(self.drawn.reads[number]):
                decided |= set(node.output)
        before, judged = "the inputs", [one for one in grown if one is not None]
        floors = zip(judged, steadied([one.floor for one in judged]), strict=True)
        limits = {one.tensor: self.multiples.limits(floor, one.dtype) for one, floor in floors}
        for part, one in zip(self.parts, grown, strict=True):
            if one is None or self.key[one.tensor] in decided:
                continue
            if limits[one.tensor].used(one.error) > 1:
                said = (
                    "every part alone is right, but in the whole graph the error leaves its limit "
                    f"between {before} and {one.tensor}: {self.amount(one)}"
                )
                return self.told(part.name, part.name, "", one, [], said)
            before = one.tensor
        return None

    # ------------------------------------------------------------------------------------ some nodes, from true inputs

    def judge(self, start: int, end: int, truth: Live) -> Stretch:
        pairs = self.pairs[start:end]
        numbers = self.file.with_fixed(pair.file for pair in pairs if pair.file is not None)
        outputs = [
            name for number in numbers for name in self.file.nodes[number].output
            if self.used_in_file.get(name, -1) >= end or name in self.file.outputs
        ]  # fmt: skip
        later = {key for pair in pairs for key in self.pairing.made(pair) if self.last_use.get(key, -1) >= end}
        keep = later | {self.key[name] for name in outputs}
        exact = self.evaluate(pairs, truth, keep, self.exact, self.theirs_exact)
        deployed = self.evaluate(pairs, truth, keep, self.deployed, self.theirs_deployed)
        found = Stretch(start, end, next={key: rounded(exact[key], deployed[key].dtype) for key in later})
        if not outputs:
            return found
        feeds = {name: array_of(truth[self.key[name]]) for name in self.file.taken(numbers)}
        found.model = cut_out(self.file, numbers, feeds, outputs)
        try:
            arrays = found.model.run(self.run)
        except (EngineError, EnvironmentLackError) as error:
            arrays, found.failure = {}, str(error)
        for name, array in arrays.items():
            found.outputs.append(self.judged(name, array, exact[self.key[name]], deployed[self.key[name]]))
        return found

    def evaluate(
        self, pairs: Iterable[Pair], truth: Live, keep: Collection[str], ours: Evaluation, theirs: Evaluation
    ) -> Live:
        """The blueprint's nodes; then those that the file has alone, which are right by their own words."""
        pairs = list(pairs)
        alone = self.file.with_fixed(p.file for p in pairs if p.file is not None and p.drawn is None)
        wanted = {self.key[name]: name for name in self.file.taken(alone)}
        numbers = self.drawn.with_fixed(p.drawn for p in pairs if p.drawn is not None)
        live = {name: truth[name] for name in self.drawn.taken(numbers)}
        ours.advance(live, numbers, {*keep, *wanted})
        if alone:
            given = truth | live
            live_theirs = {name: theirs.typed(given[key]) for key, name in wanted.items()}
            made = {name: self.key[name] for number in alone for name in self.file.nodes[number].output}
            theirs.advance(live_theirs, alone, {name for name, key in made.items() if key in keep})
            live |= {made[name]: x for name, x in live_theirs.items() if name in made}
        return live

    def judged(self, name: str, found: Array, exact: Tensor, deployed: Tensor) -> Judged:
        truth, own = array_of(exact), array_of(deployed.to(exact.dtype))
        dtype = str(deployed.dtype).removeprefix("torch.")
        floor = compare(np.where(np.isfinite(own), own, truth), truth)  # overflow is no floor
        limits = self.multiples.limits(floor, dtype) if exact.is_floating_point() else EQUAL
        if found.shape == truth.shape:
            error = compare(found, truth)
        else:
            nan = float("nan")
            error = Difference(nan, nan, nan, nan, (), nan, nan, max(1, truth.size))
        return Judged(name, dtype, error, floor, limits, truth, found.shape)

    def drill(self, part: Part, whole: Stretch, truth: Live) -> Divergence:
        """Node by node through a part that is off."""
        truth = dict(truth)
        for place in range(part.start, part.end):
            one = self.judge(place, place + 1, truth)
            if one.off:
                pair = self.pairs[place]
                module = pair.name.removeprefix("low.").rpartition(".")[0]
                return self.divergence(one, pair.name, module, self.op_of(pair), self.pairing.unlike(pair))
            truth |= one.next
        how = "it arises from its nodes run together, each alone is right"
        return self.divergence(whole, part.name, part.name.removeprefix("low."), "", how)

    # ---------------------------------------------------------------------------------------------------- in words

    def divergence(self, stretch: Stretch, node: str, module: str, op: str, how: str) -> Divergence:
        worst = stretch.worst
        said = f"does not run: {stretch.failure}" if worst is None else self.amount(worst)
        said = " ".join("; ".join(part for part in (said, how) if part).split())
        numbers = self.file.with_fixed(p.file for p in self.pairs[stretch.start : stretch.end] if p.file is not None)
        divergence = self.told(node, module, op, worst, numbers, said, stretch)
        if self.folder is not None and stretch.model is not None and stretch.outputs:
            truth = {one.tensor: one.truth for one in stretch.outputs}
            limits = {one.tensor: one.limits for one in stretch.outputs}
            write_case(self.folder, stretch.model, self.file, truth, limits, self.run, f"{node} ({op}): {said}")
        return divergence

    def told(
        self, node: str, module: str, op: str, worst: Judged | None, numbers: list[int], said: str,
        stretch: Stretch | None = None,
    ) -> Divergence:  # fmt: skip
        feeds = stretch.model.feeds if stretch and stretch.model else {}
        inputs = {name: list(array.shape) for name, array in feeds.items()}
        inputs |= {name: list(self.file.weights[name].dims) for name in self.file.weights_of(numbers)}
        outputs = {one.tensor: list(one.found_shape) for one in (stretch.outputs if stretch else [worst]) if one}
        where = str(self.folder) if self.folder is not None and stretch and stretch.outputs else ""
        return Divergence(
            self.name, node, module, op, worst.dtype if worst else "", inputs, outputs,
            worst.error.rms if worst else float("nan"), worst.floor.rms if worst else float("nan"), said, where,
            f"mdm check --replay {shlex.quote(where)}" if where else "",
        )  # fmt: skip

    def amount(self, one: Judged) -> str:
        if one.found_shape != one.truth.shape:
            return f"has the shape {list(one.found_shape)} where the model has {list(one.truth.shape)}"
        if one.error.bad:
            largest = np.abs(one.truth[np.isfinite(one.truth)]).max(initial=0.0)
            end = torch.finfo(getattr(torch, one.dtype)).max
            shown = f"{end:.0f}" if end < 1e6 else f"{end:.1e}"
            return f"not finite from finite inputs: largest true value {largest:.1e}, {one.dtype} ends at {shown}"
        if one.limits is EQUAL:
            return f"differs by {one.error.worst:.1e} where whole numbers and decisions are equal"
        if one.error.rms / one.limits.rms >= one.error.worst / one.limits.worst:
            return f"differs by {one.error.rms:.1e} where arithmetic explains {one.floor.rms:.1e}"
        return f"differs by {one.error.worst:.1e} at worst where arithmetic explains {one.floor.worst:.1e}"

    # ----------------------------------------------------------------------------------------------------- small ones

    def op_of(self, pair: Pair) -> str:
        wiring, number = (self.file, pair.file) if pair.file is not None else (self.drawn, pair.drawn)
        node = wiring.nodes[number or 0]
        return operator_of(node.domain, node.op_type)

    def taken(self, pairs: Iterable[Pair]) -> list[str]:
        return self.file.taken(pair.file for pair in pairs if pair.file is not None)

    def file_value(self, name: str) -> Tensor:
        """A weight that only the file knows, from the backend."""
        return torch.from_numpy(weights_through(self.run, self.file, [name])[name])


def rounded(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """In that type; what is beyond its end becomes its largest number, so that the truth can go on."""
    if not dtype.is_floating_point:
        return exact.to(dtype)
    end = torch.finfo(dtype).max
    return torch.where(exact.isfinite(), exact.clamp(-end, end), exact).to(dtype)


def array_of(tensor: Tensor) -> Array:
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: Array = tensor.contiguous().numpy()
    return array
