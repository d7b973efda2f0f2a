"""Single graphs: what passes, what fails, and what is excused as a near tie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from mdm.plugins.errors import EngineError
from mdm.runtime.ort import OrtGraph
from mdm.tools.check.finding import Array, Finding, Verdict
from mdm.tools.check.levels.steps import check_graph, compare, held
from mdm.tools.check.levels.texts import unrest_of
from mdm.tools.check.limits import Multiples, table_limits
from mdm.tools.check.standards.recorded import Spread
from mdm.tools.check.standards.standard import Case, Run

from ..deployed import Exported

Find = Callable[[str], Exported]


@dataclass
class Planted:
    """A standard with these cases."""

    given: list[Case]
    precision: str = "fp32"
    name: str = "planted"

    def cases(self, graph: str) -> Iterator[Case]:
        yield from self.given

    def runs(self, task: str) -> Iterator[Run]:
        return iter(())


def case_of(exported: Exported, graph: str) -> Case:
    return next(exported.reference.cases(graph))


def found_in(exported: Exported, graph: str, case: Case) -> dict[str, Finding]:
    return {one.part: one for one in check_graph(Planted([case]), exported.model, graph, Multiples())}


def with_expected(case: Case, **arrays: Array) -> Case:
    return replace(case, expected=case.expected | arrays)


@pytest.mark.parametrize("name", ["mdm", "keep", "dim", "latent", "half"])
def test_every_graph_passes_with_room(exported: Find, name: str, figure: Callable[[str, float, float], None]) -> None:
    standard, model, worst = exported(name).against_model((0, 1, 2)), exported(name).model, 0.0
    for graph in model.manifest["graphs"]:
        found = list(check_graph(standard, model, graph, Multiples()))
        parts = {one["name"] for one in model.manifest["graphs"][graph]["outputs"]}
        assert {one.part for one in found} == parts
        assert len({one.case for one in found}) == 3
        assert {one.verdict for one in found} <= {Verdict.PASS, Verdict.AMBIGUOUS}
        assert all(one.floor is not None for one in found if one.part not in ("ids", "mask_next"))
        worst = max([worst, *(one.used or 0 for one in found)])
    figure(f"{name}, share of a graph's limit", worst, 0.9)


def test_golden_cases_go_by_the_table(exported: Find) -> None:
    found = list(check_graph(exported("mdm").golden, exported("mdm").model, "step_joint_guided", Multiples()))
    assert {one.case for one in found} == {"golden"}
    assert {one.limits.source for one in found if one.limits} == {"table for fp32"}
    assert {one.verdict for one in found} == {Verdict.PASS}


@pytest.mark.parametrize("amount", [1e-4, 1e-2])
def test_an_error_is_found_and_placed(exported: Find, amount: float) -> None:
    case = case_of(exported("mdm"), "step_joint")
    assert case.deployed is not None
    off = np.zeros_like(case.expected["x0"])
    off[0, 3, 5] = amount * np.abs(case.expected["x0"]).max()
    true = replace(case, deployed=case.deployed | {"x0": case.deployed["x0"] + off})  # the model is elsewhere
    found = found_in(exported("mdm"), "step_joint", with_expected(true, x0=case.expected["x0"] + off))
    assert {part for part, one in found.items() if one.verdict is Verdict.FAIL} == {"x0"}
    assert found["x0"].error is not None
    assert found["x0"].error.at == (0, 3, 5)
    assert found["x0"].said.startswith("off by ")
    assert "at [0, 3, 5], allowed are " in found["x0"].said
    assert found["x0"].case == "seed 0, batch 1, text 8"


def test_nothing_passes_that_cannot_be_compared(exported: Find) -> None:
    case, graph = case_of(exported("mdm"), "step_joint"), "step_joint"
    x0 = case.expected["x0"]
    said = {
        "its shape is [1, 24, 12], expected [1, 24, 11]": with_expected(case, x0=x0[..., :11]),
        "its type is float32, expected that of int64": with_expected(case, x0=x0.astype(np.int64)),
        "the standard's own values are not finite": with_expected(case, x0=x0 * np.nan),
    }
    for words, spoiled in said.items():
        finding = found_in(exported("mdm"), graph, spoiled)["x0"]
        assert (finding.verdict, finding.said) == (Verdict.FAIL, words)
    finding = found_in(exported("mdm"), graph, with_expected(case, eps=x0))["eps"]
    assert (finding.verdict, finding.said) == (Verdict.FAIL, "the graph has no such output")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_fails_even_beside_an_overflowing_model(value: float) -> None:
    truth = np.ones((2, 3))
    found = truth.astype(np.float32)
    found[1, 2] = value
    for deployed in (None, truth, truth * value):
        finding = held("steps", "g", "x0", "seed 0", found, truth, deployed, table_limits("fp16"), Multiples())
        assert finding.verdict is Verdict.FAIL
        assert finding.said == "1 of 6 values are not finite, the first at [1, 2]; they should be"
    sound = held("steps", "g", "x0", "s", truth, truth, truth * value, table_limits("fp16"), Multiples())
    assert (sound.verdict, sound.limits) == (Verdict.PASS, table_limits("fp16"))


def test_a_graph_that_fails_or_that_nobody_knows(exported: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: OrtGraph, wanted: list[str], **inputs: Array) -> list[Array]:
        raise EngineError("graph 'step_joint' failed in ONNX Runtime:\nno memory")

    case = case_of(exported("mdm"), "step_joint")
    none = list(check_graph(Planted([]), exported("mdm").model, "step_joint", Multiples()))
    assert [(one.verdict, one.said) for one in none] == [(Verdict.SKIPPED, "planted has nothing for this graph")]
    wrong = replace(case, inputs=case.inputs | {"y": np.zeros((1, 1), np.int64)})
    assert "failed in ONNX Runtime: " in found_in(exported("mdm"), "step_joint", wrong)[""].said
    monkeypatch.setattr(OrtGraph, "run", fail)
    found = found_in(exported("mdm"), "step_joint", case)
    assert found[""].verdict is Verdict.FAIL
    assert found[""].said == "graph 'step_joint' failed in ONNX Runtime: no memory"


# ------------------------------------------------------------------------------------------------------ near ties


def ids_case(margin: float, moved: float | None = None) -> Case:
    """One text of three pieces, the second of which leads by `margin`; arithmetic moves logits by `moved`."""
    logits = np.full((1, 3, 5), -4.0)
    logits[0, [0, 1, 2], [1, 2, 3]] = 4.0
    logits[0, 1, 4] = 4.0 - margin
    deployed = None if moved is None else {"logits": logits + moved}
    return Case("seed 0", {}, {"ids": logits.argmax(-1), "logits": logits}, deployed)


@pytest.mark.parametrize(
    ("margin", "moved", "verdict"),
    [
        (1e-4, 1e-5, Verdict.AMBIGUOUS), (2e-4, 1e-5, Verdict.FAIL),  # 16 x 1e-5 are a tie
        (0.009, None, Verdict.AMBIGUOUS), (0.011, None, Verdict.FAIL),  # the table's 0.01
        (0.009, np.inf, Verdict.AMBIGUOUS), (0.011, np.inf, Verdict.FAIL), (0.011, np.nan, Verdict.FAIL),
    ],
)  # fmt: skip
def test_pieces(exported: Find, margin: float, moved: float | None, verdict: Verdict) -> None:
    found = {"ids": np.array([[1, 4, 3]])}
    model, case = exported("mdm").model, ids_case(margin, moved)
    with np.errstate(invalid="ignore"):
        (finding,) = compare(model, "decode_text", case, found, "fp32", Multiples())
    assert finding.verdict is verdict
    assert finding.said.startswith("1 of 3 pieces differ: piece 1 is 4, expected 2, which leads by ")
    assert finding.figures == (("agreement", pytest.approx(2 / 3)),)
    (right,) = compare(model, "decode_text", case, {"ids": case.expected["ids"]}, "fp32", Multiples())
    assert (right.verdict, right.said) == (Verdict.PASS, "")


def test_one_wrong_piece_among_near_ties_fails(exported: Find) -> None:
    (finding,) = compare(
        exported("mdm").model, "decode_text", ids_case(1e-4, 1e-5), {"ids": np.array([[0, 4, 3]])}, "fp32", Multiples()
    )
    assert finding.verdict is Verdict.FAIL
    assert "piece 0 is 0, expected 1" in finding.said


@pytest.mark.parametrize(
    ("gap", "moved", "verdict"),
    [
        (1e-5, 1e-6, Verdict.AMBIGUOUS), (1e-3, 1e-6, Verdict.FAIL),  # 16 x 1e-6 are a tie
        (1e-3, None, Verdict.AMBIGUOUS), (0.2, None, Verdict.FAIL),  # the table's 0.01
    ],
)  # fmt: skip
def test_selections(exported: Find, gap: float, moved: float | None, verdict: Verdict) -> None:
    """Two tokens about the threshold, planted as near each other as `gap`, change places."""
    graph = "step_joint_guided"
    case = next(c for c in exported("keep").against_model((1,)).cases(graph))
    case = replace(case, inputs=case.inputs | {"row": case.inputs["row"].copy()})
    case.inputs["row"][:, :, 18] = 0  # no first evaluation
    spread = Spread(exported("keep").model, graph, case.inputs["point"].shape[1])
    row, before, given = (
        spread.columns(case.inputs["row"].astype(np.float64)),
        case.inputs["x0_before"],
        case.inputs["given"],
    )
    unrest = unrest_of(row, case.expected["x0"], before, given)[0]
    order = [token for token in unrest.argsort(kind="stable") if unrest[token] >= 0]
    last, first = order[len(order) // 2 - 1], order[len(order) // 2]
    x0 = case.expected["x0"].astype(np.float64).copy()
    scale = np.sqrt(unrest[last] * (1 + gap) / unrest[first])  # the first that is left out moves nearly as little
    x0[0, first] = before[0, first] + scale * (x0[0, first] - before[0, first])
    unrest = unrest_of(row, x0, before, given)
    mask = np.ones_like(unrest, np.float32)
    mask[0, order[len(order) // 2 :]] = 0
    if len(unrest) > 1:
        mask[1] = case.expected["mask_next"][1]
    swapped = mask.copy()
    swapped[0, [last, first]] = swapped[0, [first, last]]
    deployed = None if moved is None else {"x0": before + (x0 - before) * (1 + moved / 2)}
    planted = replace(case, expected={"x0": x0, "mask_next": mask}, deployed=deployed)
    for found, expected in ((swapped, verdict), (mask, Verdict.PASS)):
        (finding,) = compare(exported("keep").model, graph, planted, {"mask_next": found}, "fp32", Multiples())
        assert finding.verdict is expected
        assert dict(finding.figures)["flips"] == (2 / len(mask) if expected is not Verdict.PASS else 0)
