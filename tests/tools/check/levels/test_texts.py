"""Choices: what rounding may turn round is ambiguous, anything else fails."""

from __future__ import annotations

import numpy as np
import pytest

from mdm.tools.check.finding import Verdict
from mdm.tools.check.levels.texts import compare_ids, compare_masks, text_faults

PAD = 1


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_equal_pieces_pass_whatever_the_margin() -> None:
    assert compare_ids(ids(3, 4), ids(3, 4), np.zeros(2), 0.1) == (1.0, Verdict.PASS, "")
    assert compare_ids(ids(), ids(), np.zeros(0), 0.1) == (1.0, Verdict.PASS, "")


def test_a_near_tie_is_ambiguous() -> None:
    agreement, verdict, said = compare_ids(ids(3, 9, 5, 9), ids(3, 4, 5, 6), np.array([1, 0.04, 1, 0.02]), 0.1)
    assert (agreement, verdict) == (0.5, Verdict.AMBIGUOUS)
    assert said == (
        "2 of 4 pieces differ: piece 1 is 9, expected 4, which leads by 0.04, below the 0.1 of a tie"
    )  # fmt: skip


def test_one_clear_difference_fails_among_ties_and_is_the_one_named() -> None:
    agreement, verdict, said = compare_ids(ids(9, 9, 8), ids(3, 4, 5), np.array([0.01, 0.02, 0.7]), 0.1)
    assert (agreement, verdict) == (0.0, Verdict.FAIL)
    assert "piece 2 is 8, expected 5, which leads by 0.7, not below the 0.1 of a tie" in said


@pytest.mark.parametrize("margin", [0.1, float("nan"), float("inf")])
def test_a_margin_that_is_not_below_the_tie_fails(margin: float) -> None:
    assert compare_ids(ids(9), ids(3), np.array([margin]), 0.1)[1] is Verdict.FAIL


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="one length"):
        compare_ids(ids(1, 2), ids(1), np.zeros(1), 0.1)


def test_the_verdict_is_that_of_the_logits() -> None:
    """Logits with noise below half the tie choose otherwise only where the margin is below the tie."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        logits = draw.normal(size=(200, 40))
        noisy = logits + draw.uniform(-0.05, 0.05, logits.shape)
        best = np.sort(logits, -1)
        margin = best[:, -1] - best[:, -2]
        verdict = compare_ids(noisy.argmax(-1), logits.argmax(-1), margin, 0.1)[1]
        assert verdict is Verdict.AMBIGUOUS
        broken = np.roll(logits, 1, axis=-1)
        assert compare_ids(broken.argmax(-1), logits.argmax(-1), margin, 0.1)[1] is Verdict.FAIL


def test_collapsed_texts() -> None:
    fine = ids(5, 6, 7, 8, 9, PAD, PAD)
    assert text_faults(ids(7, 7, 7, 7, 7, PAD, PAD), fine, PAD) == ["it repeats one piece: 5 of 5 are 7"]
    assert text_faults(ids(7, 7, 7, 7, 7, 5), fine, PAD) == ["it repeats one piece: 5 of 6 are 7"]
    assert text_faults(ids(PAD, PAD), fine, PAD) == text_faults(ids(), fine, PAD) == ["it is empty"]


def test_texts_that_are_not_collapsed() -> None:
    fine, same = ids(5, 6, 7, 8, 9), ids(7, 7, 7, 7, 7, 7)
    assert text_faults(ids(7, 7, 7, 7, 5), fine, PAD) == []  # 80% of 5 are not more than 80%
    assert text_faults(ids(7, 7, 7, 7), fine, PAD) == []  # too few to tell
    assert text_faults(same, same, PAD) == text_faults(ids(PAD), ids(PAD, PAD), PAD) == []
    assert text_faults(fine, same, PAD) == []


UNREST = np.array([-1.0, 0.10, 0.40, 0.398, 0.20, 0.90])  # the first is given


def mask(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


TRUTH = mask(1, 1, 0, 1, 1, 0)  # three of five: 0.1, 0.2, 0.398


def test_a_swap_about_the_threshold_is_ambiguous() -> None:
    flips, verdict, said = compare_masks(mask(1, 1, 1, 0, 1, 0), TRUTH, UNREST, 0.01)
    assert (flips, verdict) == (2, Verdict.AMBIGUOUS)
    assert "2 of 6 tokens are flipped: token 2 has unrest 0.4 at a threshold of 0.399, within the 0.01" in said


@pytest.mark.parametrize(
    ("found", "tie", "said"),
    [
        (mask(1, 1, 1, 0, 1, 0), 0.001, "token 2"),  # too far apart for that tie
        (mask(1, 0, 1, 1, 1, 0), 0.01, "token 1"),  # 0.1 was let go for 0.4
        (mask(1, 1, 0, 0, 1, 1), 0.01, "token 5"),
        (mask(0, 1, 1, 1, 1, 0), 0.01, "token 0"),  # what is given is always kept
        (mask(1, 1, 1, 1, 1, 0), 0.01, "5 of 6 tokens are kept, expected 4"),
        (mask(1, 1, 0, np.nan, 1, 0), 0.01, "other values"),
    ],
)
def test_another_choice_fails(found: np.ndarray, tie: float, said: str) -> None:
    flips, verdict, told = compare_masks(found, TRUTH, UNREST, tie)
    assert verdict is Verdict.FAIL
    assert flips
    assert said in told


def test_equal_masks_pass() -> None:
    assert compare_masks(TRUTH, TRUTH, UNREST, 0) == (0, Verdict.PASS, "")
    everything = np.ones(6)
    assert compare_masks(everything, everything, UNREST, 0) == (0, Verdict.PASS, "")


def test_tokens_that_never_moved_are_a_tie() -> None:
    still = np.zeros(4)
    assert compare_masks(mask(0, 0, 1, 1), mask(1, 1, 0, 0), still, 0.01)[1] is Verdict.AMBIGUOUS


def test_masks_of_rounded_unrest_are_never_wrong() -> None:
    draw = np.random.default_rng(3)
    ambiguous = 0
    for _ in range(300):
        unrest = np.where(draw.random(64) < 0.25, -1, draw.uniform(0.5, 1, 64))
        kept = int((unrest < 0).sum()) + 20

        def choose(moved: np.ndarray, kept: int = kept) -> np.ndarray:
            return (moved.argsort(kind="stable").argsort(kind="stable") < kept).astype(np.float32)

        rounded = np.where(unrest < 0, -1, unrest * (1 + draw.uniform(-0.01, 0.01, 64)))
        verdict = compare_masks(choose(rounded), choose(unrest), unrest, 0.025)[1]
        assert verdict is not Verdict.FAIL
        ambiguous += verdict is Verdict.AMBIGUOUS
        assert (
            compare_masks(choose(np.where(unrest < 0, -1, 2 - unrest)), choose(unrest), unrest, 0.025)[1]
            is Verdict.FAIL
        )
    assert ambiguous > 30
