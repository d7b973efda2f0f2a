"""Whether a deployment chose the pieces of text, and the tokens to keep, that the model chooses.

A choice hangs on a difference of numbers. Where that is smaller than rounding can move it, either choice is right: such
a near tie is AMBIGUOUS, every other difference FAILs. Letters: T pieces of a text, L latent tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from mdm.tools.check.finding import Array, Verdict

Ids = npt.NDArray[np.integer]

FEWEST, MOST = 5, 0.8  # of so many pieces, more than that share alike is a collapse


def compare_ids(found: Ids, truth: Ids, margin: Array, tie: float) -> tuple[float, Verdict, str]:
    """The share of equal pieces, the verdict, and what to say of the first piece that earns it.

    `found`, `truth` [T]; `margin` [T]: the true best logit less the second. Below `tie` it is a near tie.
    """
    _same_length(found, truth, margin)
    differs = found != truth
    if not differs.any():
        return 1.0, Verdict.PASS, ""
    agreement = 1 - float(differs.mean())
    near = margin < tie  # not where the margin is no number
    wrong = differs & ~near
    at = int(np.argmax(wrong if wrong.any() else differs))
    side = "below" if near[at] else "not below"
    said = (
        f"{int(differs.sum())} of {len(truth)} pieces differ: piece {at} is {found[at]}, expected {truth[at]}, "
        f"which leads by {margin[at]:.3g}, {side} the {tie:.3g} of a tie"
    )
    return agreement, Verdict.FAIL if wrong.any() else Verdict.AMBIGUOUS, said


def text_faults(found: Ids, truth: Ids, pad: int) -> list[str]:
    """What is wrong with a text at first sight and is not so in the true one, in plain words."""
    faults = []
    said, meant = found[found != pad], truth[truth != pad]
    if not len(said) and len(meant):
        faults.append("it is empty")
    if collapsed(said) and not collapsed(meant):
        pieces, counts = np.unique(said, return_counts=True)
        faults.append(f"it repeats one piece: {counts.max()} of {len(said)} are {pieces[counts.argmax()]}")
    return faults


def collapsed(ids: Ids) -> bool:
    return len(ids) >= FEWEST and float(np.unique(ids, return_counts=True)[1].max()) > MOST * len(ids)


def compare_masks(found: Array, truth: Array, unrest: Array, tie: float) -> tuple[int, Verdict, str]:
    """How many tokens of a selection mask are flipped, the verdict, and what to say of the first that earns it.

    `found`, `truth` [L], 1 for a token that is kept; `unrest` [L] of the true run, negative for what was given. The
    generated tokens of least unrest are kept, so many as the share says: rounding may swap two about the threshold,
    half way between the last that is kept and the first that is not, but neither add nor drop one.
    """
    _same_length(found, truth, unrest)
    if not np.isin(found, (0, 1)).all():
        return len(found), Verdict.FAIL, "the mask has other values than 0 and 1"
    flipped = found != truth
    flips = int(flipped.sum())
    if not flips:
        return 0, Verdict.PASS, ""
    kept, expected = int(found.sum()), int(truth.sum())
    if kept != expected:
        return flips, Verdict.FAIL, f"{kept} of {len(truth)} tokens are kept, expected {expected}"
    generated = unrest >= 0
    inside, outside = unrest[generated & (truth == 1)], unrest[generated & (truth == 0)]
    if not len(inside) or not len(outside):
        return flips, Verdict.FAIL, f"token {int(np.argmax(flipped))} is flipped, where there is nothing to choose"
    threshold = (float(inside.max()) + float(outside.min())) / 2
    near = generated & (np.abs(unrest - threshold) <= tie * threshold)
    wrong = flipped & ~near
    at = int(np.argmax(wrong if wrong.any() else flipped))
    side = "within" if near[at] else "not within"
    said = (
        f"{flips} of {len(truth)} tokens are flipped: token {at} has unrest {unrest[at]:.4g} at a threshold of "
        f"{threshold:.4g}, {side} the {tie:.3g} of a tie"
    )
    return flips, Verdict.FAIL if wrong.any() else Verdict.AMBIGUOUS, said


def _same_length(*arrays: Array) -> None:
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise ValueError(f"shapes {', '.join(map(str, shapes))}, expected one length for all")


def unrest_of(columns: Mapping[str, Array], x0: Array, before: Array, given: Array) -> Array:
    """By what a selecting model ranks tokens: (alpha / sigma)^2 times the mean square that the estimate moved.

    [B,L]; -1 for what is given, which is always selected.
    """
    moved = np.square(x0.astype(np.float64) - before).mean(-1)
    return np.where(given, -1.0, (columns["alpha"] / columns["sigma"]).squeeze(-1) ** 2 * moved)


def tie_of(deployed: Array, unrest: Array, multiple: float) -> float:
    """How near, relative, two tokens' unrest must be for arithmetic to swap them: by what it changes most tokens'."""
    counted = unrest > 0
    return multiple * float(np.median(np.abs(deployed - unrest)[counted] / unrest[counted])) if counted.any() else 0.0


def tie_of_logits(deployed: Array, logits: Array, multiple: float, table: float) -> float:
    """How near two logits must be for arithmetic to swap them; from the table where arithmetic overflows."""
    moved = multiple * float(np.abs(deployed - logits).max())
    return moved if np.isfinite(moved) else table
