"""Level "decoded": whole runs by the loop that serves requests, and what their latents say: pictures and texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mdm.plugins.errors import MdmError, in_one_line
from mdm.runtime.model import Model
from mdm.runtime.pictures import to_pixels
from mdm.tools.check.finding import Array, Finding, Limits, Verdict, difference, worst_of
from mdm.tools.check.levels.pictures import picture_faults, psnr, ssim
from mdm.tools.check.levels.steps import held
from mdm.tools.check.levels.texts import compare_ids, text_faults, tie_of_logits
from mdm.tools.check.levels.trajectories import all_right
from mdm.tools.check.limits import TIES, Multiples, table_limits
from mdm.tools.check.report import PicturePair, TextPair
from mdm.tools.check.standards.decoder import Decoder, by_engine
from mdm.tools.check.standards.standard import Decoded, Run
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
        yield Finding(LEVEL, run.task, "", run.label, Verdict.FAIL, in_one_line(error))
        return
    ours, ours_z = None, None
    if run.deployed is not None:
        ours_z = run.deployed.end(run)
        if run.decoded.ids is not None or run.decoded.picture is not None:
            ours = run.deployed.decode(run, ours_z)
    latents = at_end(run, "latents", z, run.states[-1]["base"], ours_z, precision)
    near = latents.verdict is Verdict.FAIL and near_decision(run, engine, z, precision, multiples)
    yield excused(latents, near)
    if found.picture is not None and run.decoded.picture is None:
        yield without_truth(model, run, found.picture)
    elif found.picture is not None and run.decoded.picture is not None:
        known = None if ours is None else ours.picture
        yield from check_pictures(model, run, found.picture, run.decoded.picture, known, precision, near)
    if found.ids is not None and run.decoded.ids is not None:
        yield from check_texts(model, run, found.ids, ours, TIES[precision], multiples, near)


def without_truth(model: Model, run: Run, found: Array) -> Finding:
    """A picture that the standard has no true one for: what is wrong with it at first sight."""
    low, high = model.picture["range"]
    faults = [] if np.isfinite(found).all() else ["not finite"]
    shown = np.nan_to_num(found.clip(low, high), nan=low)
    faults += [fault for one in shown for fault in picture_faults(to_pixels(one, low, high), None)]
    said = "the standard makes no picture of its latents: an image autoencoder is named with --autoencoder"
    verdict = Verdict.FAIL if faults else Verdict.SKIPPED
    return Finding(LEVEL, run.task, "picture", run.label, verdict, "; ".join(faults) or said, found.shape)


def near_decision(run: Run, engine: OnBackend, z: Array, precision: str, multiples: Multiples) -> bool:
    """Whether a run that ends far away, at `z`, was right at every evaluation, and ended where these lead.

    Where a model selects tokens, the run by itself may rightly have chosen others, so the ends are not compared.
    """
    if run.deployed is None or not np.isfinite(z).all():
        return False
    walked = walk(run, engine.advance)
    if "mask" not in run.states[0] and not np.allclose(z, walked.free[-1]["base"], rtol=1e-6, atol=1e-6):
        return False
    return all_right(run, walked, run.deployed, precision, multiples)


def excused(finding: Finding, near: bool) -> Finding:
    """What fails because its run was near a decision is AMBIGUOUS; what is not finite, or of another shape, is not."""
    if finding.verdict is not Verdict.FAIL or finding.error is None or finding.error.bad or not near:
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
    model: Model, run: Run, found: Array, truth: Array, deployed: Array | None, precision: str, near: bool
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
    model: Model, run: Run, found: Array, ours: Decoded | None, tie: float, multiples: Multiples, near: bool
) -> Iterator[Finding | TextPair]:
    truth, margin, T = run.decoded.ids, run.decoded.margin, found.shape[-1]
    assert truth is not None
    assert margin is not None
    if found.shape != truth.shape:
        said = f"its shape is {list(found.shape)}, expected {list(truth.shape)}"
        yield Finding(LEVEL, run.task, "text", run.label, Verdict.FAIL, said, found.shape)
        return
    if ours is not None and ours.logits is not None and run.decoded.logits is not None:
        tie = tie_of_logits(ours.logits, run.decoded.logits, multiples.worst, tie)
    judged, pad = [], model.text["pad"]
    for b in range(run.batch):
        new = ~run.inputs["given"][b, :T]
        agreement, verdict, said = compare_ids(found[b][new], truth[b][new], margin[b][new], tie)
        faults = text_faults(found[b][new], truth[b][new], pad)
        if near and verdict is Verdict.FAIL:
            verdict = Verdict.AMBIGUOUS
        judged.append((agreement, Verdict.FAIL if faults else verdict, "; ".join([*faults, *([said] if said else [])])))
        if model.text["tokenizer"]:
            true, made = (model.tokenizer.decode(ids[b][new]) for ids in (truth, found))
            yield TextPair(run.task, run.seed, true, made, agreement)
    verdict = worst_of(one for _, one, _ in judged)
    said = "" if verdict is Verdict.PASS else next(said for _, one, said in judged if one is verdict)
    agreement = sum(one for one, _, _ in judged) / len(judged)
    yield Finding(LEVEL, run.task, "text", run.label, verdict, said, found.shape, figures=(("agreement", agreement),))
