"""Pictures and texts at the end of whole runs: sound ones, and those that a broken half makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import EngineError
from mdm.runtime.ort import OrtGraph
from mdm.tools.check import limits
from mdm.tools.check.finding import Array, Finding, Verdict
from mdm.tools.check.levels.decoded import (
    at_end,
    check_decoded,
    check_pictures,
    check_texts,
    excused,
    near_decision,
    without_truth,
)
from mdm.tools.check.limits import Multiples
from mdm.tools.check.report import PicturePair, TextPair
from mdm.tools.check.standards.blueprint import make_blueprint
from mdm.tools.check.standards.decoder import Decoder, by_engine
from mdm.tools.check.standards.live import ReferenceStandard
from mdm.tools.check.standards.standard import Decoded, Run
from mdm.tools.check.standards.walk import OnBackend

from ..deployed import Exported

Find = Callable[[str], Exported]


def run_of(exported: Exported, task: str) -> Run:
    return next(iter(exported.reference.runs(task)))


def checked(exported: Exported, run: Run) -> list[Any]:
    engine = OnBackend(exported.model.backend)
    return list(check_decoded(exported.model, run, engine, exported.model.manifest["precision"], Multiples()))


def findings(items: list[Any]) -> dict[str, Finding]:
    return {one.part: one for one in items if isinstance(one, Finding)}


@pytest.mark.parametrize("name", ["mdm", "keep", "dim", "latent", "half"])
def test_what_a_run_says(exported: Find, name: str) -> None:
    model = exported(name).model
    for task, told in model.manifest["tasks"].items():
        items = checked(exported(name), run_of(exported(name), task))
        found = findings(items)
        makes_text, makes_image = (told[kind] in ("made", "both") for kind in ("text", "image"))
        assert set(found) == {"latents"} | ({"text"} if makes_text else set()) | ({"picture"} if makes_image else set())
        allowed = {"latents": {Verdict.PASS}, "picture": {Verdict.PASS}, "text": {Verdict.PASS, Verdict.AMBIGUOUS}}
        assert all(one.verdict in allowed[part] for part, one in found.items())
        pictures = [one for one in items if isinstance(one, PicturePair)]
        texts = [one for one in items if isinstance(one, TextPair)]
        assert (len(pictures), len(texts)) == (2 * makes_image, 2 * makes_text)
        if makes_image:
            assert min(one.psnr for one in pictures) == dict(found["picture"].figures)["psnr"] > 40
            assert pictures[0].found.shape == pictures[0].truth.shape
            assert pictures[0].found.shape[2] == 3


def test_the_autoencoder_may_be_left_out(exported: Find) -> None:
    """Latents of three channels are no pixels, where the bundle has an autoencoder of its own."""
    one = exported("latent")
    standard = ReferenceStandard(one.model, make_blueprint(one.model.bundle, one.checkpoint, None), (0,))
    found = findings(checked(one, next(iter(standard.runs("class_to_image")))))
    assert found["latents"].verdict is Verdict.PASS
    assert found["picture"].verdict is Verdict.SKIPPED
    assert "--autoencoder" in found["picture"].said


def test_the_engines_own_halves(exported: Find) -> None:
    """Text first, the picture last; a dialogue turn's new picture, not the earlier one."""
    model, golden = exported("mdm").model, exported("mdm").golden
    for task in ("joint", "turn", "complete"):
        (run,) = golden.runs(task)
        said = Decoder(model, by_engine(model.backend))(task, run.graph, run.states[-1]["base"].astype(np.float32))
        assert np.array_equal(said.ids, run.decoded.ids)  # type: ignore[arg-type]
        assert said.margin == pytest.approx(run.decoded.margin, abs=1e-4)
        assert (said.picture is None) == (run.decoded.picture is None) == (task == "complete")
        if said.picture is not None:
            assert said.picture == pytest.approx(run.decoded.picture, abs=1e-4)


# --------------------------------------------------------------------------------------------------- broken pictures

BROKEN = {
    "it is black": lambda x: np.full_like(x, -1),
    "it is white": lambda x: np.full_like(x, 1),
    "it is one flat colour": lambda x: np.full_like(x, 0.3),
    "most of its values are at 0 or 255": lambda x: np.sign(np.random.default_rng(0).standard_normal(x.shape)),
}


def pictures(exported: Find) -> tuple[Run, Array]:
    """Smooth ones in the middle of the range: an untrained model's own are flat."""
    run = next(iter(exported("mdm").golden.runs("class_to_image")))
    y, x = np.mgrid[:32, :32] / 31 - 0.5
    true = np.stack([np.stack([x, y, x * y]), np.stack([y, x + y, x])]).astype(np.float32)  # [B,C,H,W]
    return run, true


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_pictures_trip(exported: Find, fault: str) -> None:
    run, true = pictures(exported)
    made = true.copy()
    made[1] = BROKEN[fault](true[1])
    finding, *pairs = check_pictures(exported("mdm").model, run, made, true, None, "fp32", False)
    assert isinstance(finding, Finding)
    assert finding.verdict is Verdict.FAIL
    assert finding.said.startswith("off by ")
    assert finding.said.endswith(fault)
    assert len(pairs) == 2
    assert dict(finding.figures)["psnr"] < 30


def test_a_black_picture_fails_whatever_the_limits_say(exported: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit as wide as the picture itself lets it pass; its looks do not."""
    run, true = pictures(exported)
    monkeypatch.setitem(limits.RUN_TABLE, "fp32", 1e6)
    finding, *_ = check_pictures(exported("mdm").model, run, np.full_like(true, -1), true, None, "fp32", False)
    assert isinstance(finding, Finding)
    assert finding.used is not None
    assert finding.used < 1
    assert (finding.verdict, finding.said) == (Verdict.FAIL, "it is black; it is black")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pictures_that_are_not_finite_fail_without_a_warning(exported: Find, value: float) -> None:
    run, true = pictures(exported)
    made = true.copy()
    made[0, 1] = value
    finding, *pairs = check_pictures(exported("mdm").model, run, made, true, true, "fp32", False)
    assert isinstance(finding, Finding)
    assert finding.verdict is Verdict.FAIL
    assert finding.said.startswith("1024 of 6144 values are not finite, the first at [0, 1, 0, 0]")
    assert all(isinstance(one, PicturePair) and np.isfinite(one.psnr) for one in pairs)


# ------------------------------------------------------------------------------------------------------------ texts


def text_run(exported: Find, truth: Array, margin: float) -> Run:
    run = next(iter(exported("mdm").golden.runs("joint")))
    return replace(run, decoded=Decoded(truth, np.full(truth.shape, margin)))


TRUE = np.array([[5, 6, 7, 8, 9, 10, 11, 12], [5, 6, 7, 8, 9, 10, 11, 12]])


@pytest.mark.parametrize(("margin", "verdict"), [(0.005, Verdict.AMBIGUOUS), (0.02, Verdict.FAIL)])
def test_texts(exported: Find, margin: float, verdict: Verdict) -> None:
    made = TRUE.copy()
    made[1, 3] = 20
    items = list(
        check_texts(exported("mdm").model, text_run(exported, TRUE, margin), made, None, 0.01, Multiples(), False)
    )
    finding = items[-1]
    assert isinstance(finding, Finding)
    assert finding.verdict is verdict
    assert finding.said.startswith("1 of 8 pieces differ: piece 3 is 20, expected 8")
    assert dict(finding.figures)["agreement"] == pytest.approx(15 / 16)
    pairs = [one for one in items if isinstance(one, TextPair)]
    assert [one.agreement for one in pairs] == [1, 7 / 8]
    assert pairs[0].truth == pairs[0].found
    assert pairs[1].truth != pairs[1].found


def test_a_text_that_collapsed_fails_even_as_a_near_tie(exported: Find) -> None:
    model = exported("mdm").model
    for made, words in ((np.full_like(TRUE, 7), "it repeats one piece"), (np.zeros_like(TRUE), "it is empty")):
        *_, finding = check_texts(model, text_run(exported, TRUE, 1e-9), made, None, 0.01, Multiples(), False)
        assert isinstance(finding, Finding)
        assert finding.verdict is Verdict.FAIL
        assert finding.said.startswith(words)


def test_only_new_pieces_are_judged(exported: Find) -> None:
    run = text_run(exported, TRUE, 1.0)
    given = np.zeros_like(run.inputs["given"])
    given[:, :4] = True
    made = TRUE.copy()
    made[:, :4] = 1
    *_, finding = check_texts(
        exported("mdm").model, replace(run, inputs=run.inputs | {"given": given}), made, None, 0.01, Multiples(), False
    )
    assert isinstance(finding, Finding)
    assert finding.verdict is Verdict.PASS


def test_an_engine_that_fails_is_a_finding(exported: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: OrtGraph, wanted: list[str], **inputs: Array) -> list[Array]:
        raise EngineError("graph 'decode_image' failed in ONNX Runtime:\nno memory")

    run = run_of(exported("mdm"), "class_to_image")
    monkeypatch.setattr(OrtGraph, "run", fail)
    (finding,) = checked(exported("mdm"), run)
    assert finding.verdict is Verdict.FAIL
    assert finding.said == "graph 'decode_image' failed in ONNX Runtime: no memory"


@pytest.mark.parametrize(
    ("value", "verdict"), [(0.3, Verdict.FAIL), (float("nan"), Verdict.FAIL), (None, Verdict.SKIPPED)]
)
def test_a_picture_without_a_true_one_is_looked_at(exported: Find, value: float | None, verdict: Verdict) -> None:
    model = exported("latent").model
    [run] = exported("latent").golden.runs("class_to_image")
    drawn = np.random.default_rng(0).uniform(-1, 1, (1, 3, 16, 16)).astype(np.float32)
    finding = without_truth(model, run, drawn if value is None else np.full_like(drawn, value))
    assert finding.verdict is verdict


def test_a_run_near_a_decision_is_ambiguous_if_every_evaluation_is_right(exported: Find) -> None:
    """The end is pushed away behind the evaluations' back, and together with them."""
    [run] = exported("mdm").against_model((0,)).runs("complete")
    engine = OnBackend(exported("mdm").model.backend)
    z = engine.end(run)
    far = at_end(run, "latents", z + 1, run.states[-1]["base"], None, "fp32")
    assert far.verdict is Verdict.FAIL
    assert excused(far, near_decision(run, engine, z + 1, "fp32", Multiples())).verdict is Verdict.FAIL
    assert excused(far, near_decision(run, engine, z, "fp32", Multiples())).verdict is Verdict.AMBIGUOUS


@pytest.mark.parametrize(
    ("task", "half", "output"), [("text_to_image", "decode_image", "picture"), ("complete", "decode_text", "ids")]
)
def test_a_broken_decoder_is_not_excused(
    exported: Find, monkeypatch: pytest.MonkeyPatch, task: str, half: str, output: str
) -> None:
    """Its run is right at every evaluation, and ends where it should."""
    [run] = exported("mdm").against_model((0,)).runs(task)
    sound = OrtGraph.run

    def broken(graph: OrtGraph, wanted: Any, **inputs: Array) -> list[Array]:
        said = dict(zip(wanted, sound(graph, wanted, **inputs), strict=True))
        if graph.name == half:
            said[output] = np.roll(said[output], 1, axis=-1)
        return list(said.values())

    monkeypatch.setattr(OrtGraph, "run", broken)
    found = check_decoded(exported("mdm").model, run, OnBackend(exported("mdm").model.backend), "fp32", Multiples())
    verdicts = {one.part: one.verdict for one in found if isinstance(one, Finding)}
    assert verdicts.pop("latents") is Verdict.PASS
    assert set(verdicts.values()) == {Verdict.FAIL}
