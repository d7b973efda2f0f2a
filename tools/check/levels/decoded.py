"""Level "decoded": whole runs by the loop that serves requests, and what their latents say: pictures and texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np

from mdm.plugins.errors import MdmError
from mdm.runtime.backend import Backend
from mdm.runtime.model import Model, makes
from mdm.runtime.pictures import to_pixels
from mdm.tools.check.finding import Array, Finding, Limits, Verdict, difference, worst_of
from mdm.tools.check.levels.pictures import picture_faults, psnr, ssim
from mdm.tools.check.levels.steps import held
from mdm.tools.check.levels.texts import compare_ids, text_faults
from mdm.tools.check.levels.trajectories import all_right
from mdm.tools.check.limits import TIES, Multiples, table_limits
from mdm.tools.check.report import PicturePair, TextPair
from mdm.tools.check.standards.standard import Decoded, Run, makes_pixels, tie_of_logits
from mdm.tools.check.standards.walk import OnBackend, walk

LEVEL = "decoded"
CHANCE = Multiples(100, 100)  # of the floor at a run's end; 10 was seen, see `trajectories.py`


def check_decoded(
    model: Model, run: Run, engine: OnBackend, precision: str, multiples: Multiples
) -> Iterator[Finding | PicturePair | TextPair]:
    try:
        z = engine.end(run)
        found = Decoder(model, by_engine(model.backend))(run.task, run.graph, z)
    except MdmError as error:
        yield Finding(LEVEL, run.task, "", run.label, Verdict.FAIL, " ".join(str(error).split()))
        return
    ours, ours_z = None, None
    if run.deployed is not None:
        ours_z = run.deployed.end(run)
        if run.decoded.ids is not None or run.decoded.picture is not None:
            ours = run.deployed.decode(run, ours_z)
    near = near_decision(run, engine, z, precision, multiples)
    yield excused(at_end(run, "latents", z, run.states[-1]["base"], ours_z, precision), near)
    if found.picture is not None and run.decoded.picture is None:
        yield without_truth(model, run, found.picture)
    elif found.picture is not None and run.decoded.picture is not None:
        known = None if ours is None else ours.picture
        yield from check_pictures(model, run, found.picture, run.decoded.picture, known, precision, near)
    if found.ids is not None and run.decoded.ids is not None:
        yield from check_texts(model, run, found.ids, ours, TIES[precision], multiples)


Half = Callable[[str, list[str], Array], list[Array]]  # graph, outputs wanted, latents -> those outputs


def by_engine(backend: Backend) -> Half:
    return lambda graph, wanted, z: backend.graph(graph).run(wanted, z=z)


class Decoder:
    """Latents of a run to text and picture, by the halves of the bundle's autoencoder, whoever computes them."""

    def __init__(self, model: Model, half: Half) -> None:
        self.model, self.half = model, half

    def __call__(self, task: str, graph: str, z: Array) -> Decoded:
        model, described, told = self.model, self.model.bundle.graph(graph), self.model.task(task)
        size = described["image_size"]
        if model.text is None:
            half = model.half("decode", size)
            if half in model.manifest["graphs"]:
                return Decoded(picture=self.half(half, ["picture"], z)[0])
            return Decoded(picture=z if makes_pixels(model, graph) else None)
        M = (size // model.picture["patch"]) ** 2 if size else 0
        said = Decoded()
        if makes(told["text"]):
            T = z.shape[1] - described["pictures"] * M
            ids, logits = self.half("decode_text", ["ids", "logits"], np.ascontiguousarray(z[:, :T]))
            best = np.sort(logits, axis=-1)
            said = replace(said, ids=ids, margin=best[..., -1] - best[..., -2], logits=logits)
        if makes(told["image"]):
            (picture,) = self.half(model.half("decode", size), ["picture"], np.ascontiguousarray(z[:, -M:]))
            said = replace(said, picture=picture)
        return said


def without_truth(model: Model, run: Run, found: Array) -> Finding:
    """A picture that the standard has no true one for: what is wrong with it at first sight."""
    low, high = model.picture["range"]
    faults = [] if np.isfinite(found).all() else ["not finite"]
    shown = np.nan_to_num(found.clip(low, high), nan=low)
    faults += [fault for one in shown for fault in picture_faults(to_pixels(one, low, high), None)]
    said = "the standard makes no picture of its latents: an image autoencoder is named with --autoencoder"
    verdict = Verdict.FAIL if faults else Verdict.SKIPPED
    return Finding(LEVEL, run.task, "picture", run.label, verdict, "; ".join(faults) or said, found.shape)


def near_decision(run: Run, engine: OnBackend, z: Array, precision: str, multiples: Multiples) -> Callable[[], bool]:
    """Whether a run that ends far away was right at every evaluation; and, where it selects nothing, ended where the
    single evaluations do. Asked only of a run that did."""

    @cache
    def holds() -> bool:
        if run.deployed is None:
            return False
        walked = walk(run, engine.advance)
        same = "mask" in run.states[0] or np.allclose(z, walked.free[-1]["base"], rtol=1e-6, atol=1e-6)
        return bool(same) and all_right(run, walked, run.deployed, precision, multiples)

    return holds


def excused(finding: Finding, near: Callable[[], bool]) -> Finding:
    if finding.verdict is not Verdict.FAIL or finding.error is None or finding.error.bad or not near():
        return finding
    said = f"{finding.said}; every evaluation is right from where it stood: a near decision"
    return replace(finding, verdict=Verdict.AMBIGUOUS, said=said)


def at_end(run: Run, part: str, found: Array, truth: Array, deployed: Array | None, precision: str) -> Finding:
    """How errors have built up until here is chance: held to the fixed table, or to `CHANCE` times the floor."""
    table, floor = table_limits(precision, run=True), None if deployed is None else difference(deployed, truth)
    if floor is not None and not floor.bad:
        near = CHANCE.limits(floor, found.dtype.name)
        said = f"{table.source}, or {CHANCE.rms:g} x floor if that is less"
        table = Limits(min(table.rms, near.rms), min(table.worst, near.worst), said)
    return replace(held(LEVEL, run.task, part, run.label, found, truth, None, table, CHANCE), floor=floor)


def check_pictures(
    model: Model, run: Run, found: Array, truth: Array, deployed: Array | None, precision: str, near: Callable[[], bool]
) -> Iterator[Finding | PicturePair]:
    finding = excused(at_end(run, "picture", found, truth, deployed, precision), near)
    if found.shape != truth.shape:
        yield finding
        return
    low, high = model.picture["range"]
    shown = np.nan_to_num(found.clip(low, high), nan=low)
    pixels = [[to_pixels(one, low, high) for one in batch] for batch in (shown, truth)]
    pairs = [
        PicturePair(run.task, run.seed, true, made, psnr(made, true), ssim(made, true))
        for made, true in zip(*pixels, strict=True)
    ]
    faults = [fault for pair in pairs for fault in picture_faults(pair.found, pair.truth)]
    if faults:
        finding = replace(finding, verdict=Verdict.FAIL, said="; ".join([finding.said, *faults]).strip("; "))
    worst = (("psnr", min(pair.psnr for pair in pairs)), ("ssim", min(pair.ssim for pair in pairs)))
    yield replace(finding, figures=worst)
    yield from pairs


def check_texts(
    model: Model, run: Run, found: Array, ours: Decoded | None, tie: float, multiples: Multiples
) -> Iterator[Finding | TextPair]:
    truth, margin, T = run.decoded.ids, run.decoded.margin, found.shape[1]
    assert truth is not None
    assert margin is not None
    if ours is not None and ours.logits is not None and run.decoded.logits is not None:
        tie = tie_of_logits(ours.logits, run.decoded.logits, multiples.worst, tie)
    judged, pad = [], model.text["pad"]
    for b in range(run.batch):
        new = ~run.inputs["given"][b, :T]
        agreement, verdict, said = compare_ids(found[b][new], truth[b][new], margin[b][new], tie)
        faults = text_faults(found[b][new], truth[b][new], pad)
        judged.append((agreement, Verdict.FAIL if faults else verdict, "; ".join([*faults, *([said] if said else [])])))
        if model.text["tokenizer"]:
            true, made = (model.tokenizer.decode(ids[b][new]) for ids in (truth, found))
            yield TextPair(run.task, run.seed, true, made, agreement)
    verdict = worst_of(one for _, one, _ in judged)
    said = "" if verdict is Verdict.PASS else next(said for _, one, said in judged if one is verdict)
    agreement = sum(one for one, _, _ in judged) / len(judged)
    yield Finding(LEVEL, run.task, "text", run.label, verdict, said, found.shape, figures=(("agreement", agreement),))
