"""Standards: the path of a table is the reference's own, and golden files are not trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mdm.export.golden import default_run, reference_run
from mdm.plugins.errors import InputError, ParityError
from mdm.reference.config import Config
from mdm.runtime.bundle import open_bundle
from mdm.runtime.model import Model
from mdm.runtime.ort import OrtBackend
from mdm.runtime.solver import SOLVERS, sampler_of
from mdm.tools.check.finding import Array, Verdict, difference
from mdm.tools.check.levels.texts import tie_of, tie_of_logits, unrest_of
from mdm.tools.check.levels.trajectories import check_table
from mdm.tools.check.standards.golden import GoldenStandard
from mdm.tools.check.standards.recorded import Spread, run_of

from ..deployed import Exported, sign, spoil_golden, spoil_manifest

Find = Callable[[str], Exported]
Spoiled = Callable[..., Model]


@pytest.fixture
def spoiled(exported: Find, tmp_path: Path) -> Iterator[Spoiled]:
    """spoiled("mdm", "task_joint", change): that bundle's model, with one golden file changed and signed anew."""

    def make(name: str, golden: str, change: Callable[[dict[str, Array]], object]) -> Model:
        bundle = open_bundle(spoil_golden(exported(name).bundle, tmp_path / "spoiled.bundle", golden, change))
        return Model(bundle, OrtBackend(bundle, threads=1))

    return make


# ------------------------------------------------------------------------------------------------- runs of a table


def with_sampler(model: Model, config: Config, task: str, **changes: Any) -> tuple[Model, Config]:
    """The same model, with another sampler as its own."""
    settings = {"steps": 5, "t_start": 0.99, **changes}
    config = replace(config, sampler=settings, sampler_for={})
    pinned = sampler_of({"sampler": config.sampler, "sampler_for": {}}, task)
    manifest = model.manifest | {"sampler": pinned, "sampler_for": {}}
    return Model(replace(model.bundle, manifest=manifest), model.backend), config


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("name", "task"), [("mdm", "joint"), ("dim", "class_to_image")])
def test_the_table_leads_where_the_reference_goes(exported: Find, solver: str, name: str, task: str) -> None:
    """Every solver of either side, two noise schedules, guidance, and the result too."""
    blueprint = exported(name).reference.blueprint
    model, config = with_sampler(exported(name).model, blueprint.plan.config, task, solver=solver, guidance=1.5)
    run = run_of(model, task, 0, reference_run(config, blueprint.truth, default_run(config, task)))
    assert run.points is not None
    assert run.points.dtype == np.float64
    finding = check_table(run, run.points)
    assert finding.verdict is Verdict.PASS
    assert finding.limits is not None
    assert finding.limits.rms == 1e-9
    assert difference(run.states[-1]["base"], run.points[-1]).rms < 1e-9


def test_selecting_runs_carry_mask_and_estimate(exported: Find) -> None:
    blueprint, model = exported("keep").reference.blueprint, exported("keep").model
    config = blueprint.plan.config
    arrays = reference_run(config, blueprint.truth, default_run(config, "joint"))
    run = run_of(model, "joint", 0, dict(arrays))
    spread, given = Spread(model, run.graph, run.states[0]["base"].shape[1]), run.inputs["given"]
    assert all(np.array_equal(run.states[k]["mask"], arrays["out.mask"][k]) for k in range(len(run)))
    assert run.states[0]["mask"].min() == 1
    for k in range(1, len(run) - 1):  # what was selected is what had least unrest
        row = spread.columns(run.rows[k])
        unrest = unrest_of(row, run.states[k + 1]["x0_before"], run.states[k]["x0_before"], given)
        mask = run.states[k + 1]["mask"]
        assert (unrest[given] == -1).all()
        for kept, moved in zip(mask, unrest, strict=True):
            assert moved[kept == 1].max() < moved[kept == 0].min()


def test_spread_gives_text_and_picture_their_own_numbers(exported: Find) -> None:
    model = exported("mdm").model
    run = next(exported("mdm").golden.runs("joint"))
    spread = Spread(model, run.graph, 24)
    assert spread.tokens == [8, 16]
    alpha = spread.columns(run.rows[1])["alpha"]  # [L,1]
    assert alpha.shape == (24, 1)
    assert set(alpha[:8, 0]) | set(alpha[8:, 0]) == {*run.rows[1][:, 1]}
    assert alpha[0] != alpha[8]
    assert Spread(model, "step_image", 16).columns(run.rows[:, :1])["alpha"].shape == (len(run), 1, 1)


def test_a_sampler_that_is_not_the_models(exported: Find, tmp_path: Path) -> None:
    """Heun asks the network twice a step; the recorded run did so once."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["sampler"]["solver"] = "heun"

    bundle = open_bundle(spoil_manifest(exported("mdm").bundle, tmp_path / "b", change))
    with pytest.raises(ParityError, match="makes 6 evaluations in 3 steps") as refused:
        list(GoldenStandard(Model(bundle, OrtBackend(bundle, threads=1))).runs("turn"))
    assert len(str(refused.value).splitlines()) == 2


# ----------------------------------------------------------------------------------------------------- near ties


def test_ties() -> None:
    unrest = np.array([[-1.0, 2.0, 4.0, 8.0]])
    assert tie_of(unrest * [[1, 1.01, 1.02, 1.9]], unrest, 10) == pytest.approx(0.2)  # the median, given ones left out
    assert tie_of(unrest, -np.ones((1, 4)), 10) == 0
    logits = np.zeros((1, 2, 3))
    assert tie_of_logits(logits + np.array([0, 0.01, -0.02]), logits, 16, 0.5) == pytest.approx(0.32)
    assert tie_of_logits(logits + np.inf, logits, 16, 0.5) == 0.5


# --------------------------------------------------------------------------------------------------- golden files


def test_golden_cases_and_runs(exported: Find) -> None:
    golden, manifest = exported("mdm").golden, exported("mdm").model.manifest
    for graph in manifest["graphs"]:
        (case,) = golden.cases(graph)
        assert case.deployed is None
        assert case.inputs.keys() == {i["name"] for i in manifest["graphs"][graph]["inputs"]}
    for task in manifest["tasks"]:
        (run,) = golden.runs(task)
        assert (run.label, run.batch, len(run.states)) == ("seed 0", 2, len(run) + 1)
        assert run.recorded == "float64"
    assert list(golden.cases("no such graph")) == list(golden.runs("no such task")) == []


def test_no_golden_files_at_all(exported: Find) -> None:
    with pytest.raises(InputError, match="was exported without validation") as refused:
        GoldenStandard(exported("half").model)
    assert "--against reference --checkpoint" in str(refused.value)


def refusal(model: Model, golden: str) -> str:
    standard = GoldenStandard(model)
    with pytest.raises(InputError) as refused:
        list(standard.runs(golden.removeprefix("task_")) if golden.startswith("task_") else standard.cases(golden))
    assert len(str(refused.value).splitlines()) <= 3
    return str(refused.value)


@pytest.mark.parametrize("key", ["out.eps", "in.steps"])
def test_a_run_of_an_older_version(spoiled: Spoiled, key: str) -> None:
    said = refusal(spoiled("mdm", "task_joint", lambda arrays: arrays.pop(key)), "task_joint")
    assert "the golden run of task 'joint'" in said
    assert "older version of mdm-deploy: export the checkpoint again" in said


def put(name: str, array: Any) -> Callable[[dict[str, Array]], object]:
    return lambda arrays: arrays.update({name: np.asarray(array(arrays[name]) if callable(array) else array)})


def with_nan(array: Array) -> Array:
    array = array.copy()
    array.flat[-1] = np.nan
    return array


SPOILED_RUNS = {
    "no start": (lambda arrays: arrays.pop("in.base"), "it lacks 'in.base'"),
    "no conditioning": (lambda arrays: arrays.pop("in.uncond"), "it lacks 'in.uncond'"),
    "no noise": (lambda arrays: arrays.pop("in.noise"), "it lacks 'in.noise'"),
    "no result": (lambda arrays: arrays.pop("out.z"), "it lacks 'out.z'"),
    "no margin": (lambda arrays: arrays.pop("out.margin"), "it lacks 'out.margin'"),
    "no picture": (lambda arrays: arrays.pop("out.picture"), "it lacks 'out.picture'"),
    "nan": (put("out.eps", with_nan), "out.eps has values that are not finite"),
    "nan in the result": (put("out.z", with_nan), "out.z has values that are not finite"),
    "no batch": (put("in.base", lambda x: x[0]), "in.base has the shape [24, 12], expected [batch, tokens, 12]"),
    "other batch": (put("out.z", lambda x: x[:1]), "out.z has the shape [1, 24, 12], expected [2, 24, 12]"),
    "nobody": (put("in.y", lambda x: x[:0]), "in.y has the shape [0]"),
    "half": (put("in.base", lambda x: x.astype(np.float16)), "in.base is float16, expected float32"),
    "given as numbers": (put("in.given", lambda x: x.astype(np.int64)), "in.given is int64, expected bool"),
    "whole": (put("out.points", lambda x: x.astype(np.int32)), "out.points is int32, expected floats"),
    "short": (put("out.points", lambda x: x[1:]), "out.points has the shape [3, 2, 24, 12], expected [4, 2"),
    "no steps": (put("in.steps", np.array([0])), "in.steps is 0, expected 1 to 4"),
    "very many steps": (put("in.steps", np.array([2**62])), "expected 1 to 4"),
    "steps as floats": (put("in.steps", np.array([4.0])), "in.steps is float64, expected whole numbers"),
    "steps of nothing": (put("in.steps", np.zeros(0, np.int64)), "in.steps has the shape [0], expected [1]"),
    "unknown pieces": (put("out.ids", lambda x: x + 10**6), "expected 0 to 39"),
    "too long": (put("out.ids", lambda x: np.concatenate([x, x], 1)), "out.margin has the shape [2, 8]"),
    "narrow": (put("out.picture", lambda x: x[..., :8]), "shape [2, 3, 32, 8], expected [2, 3, 32, 32]"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED_RUNS)
def test_spoiled_runs_are_refused(spoiled: Spoiled, what: str) -> None:
    """Signed anew, as whoever changes a bundle can."""
    change, expected = SPOILED_RUNS[what]
    said = refusal(spoiled("mdm", "task_joint", change), "task_joint")
    assert said.startswith("golden file 'golden/task_joint.safetensors' of bundle")
    assert expected in said.splitlines()[1]


SPOILED_CASES = {
    "lacks an input": (lambda arrays: arrays.pop("in.row"), "it lacks 'in.row'"),
    "answers less": (lambda arrays: arrays.pop("out.x0"), "it lacks 'out.x0'"),
    "answers nothing": (lambda arrays: [arrays.pop(n) for n in list(arrays) if n[:3] == "out"], "it lacks 'out."),
    "an argument of ours": (lambda arrays: arrays.update({"in.wanted": np.ones(1)}), "it has 'in.wanted'"),
    "nan": (put("out.x0", with_nan), "out.x0 has values that are not finite"),
    "infinite input": (put("in.point", lambda x: x + np.inf), "in.point has values that are not finite"),
    "turned": (put("in.row", lambda x: x.transpose(0, 2, 1)), "in.row has the shape"),
    "two batches": (put("in.y", lambda x: np.concatenate([x, x])), "in.y has the shape [2], expected [1]"),
    "wide": (put("in.point", lambda x: x.astype(np.float64)), "in.point is float64, expected float32"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILED_CASES)
def test_spoiled_cases_are_refused(spoiled: Spoiled, what: str) -> None:
    change, expected = SPOILED_CASES[what]
    assert expected in refusal(spoiled("mdm", "step_joint_guided", change), "step_joint_guided").splitlines()[1]


def test_a_type_that_numpy_has_not(exported: Find, tmp_path: Path) -> None:
    folder = spoil_manifest(exported("dim").bundle, tmp_path / "b", lambda manifest: None)
    save_file({"in.z": torch.ones(2, dtype=torch.bfloat16)}, folder / "golden" / "denoise_image.safetensors")
    sign(folder)
    bundle = open_bundle(folder)
    said = refusal(Model(bundle, OrtBackend(bundle, threads=1)), "denoise_image")
    assert "golden/denoise_image.safetensors" in said


def test_a_golden_file_that_is_not_what_was_signed(exported: Find, tmp_path: Path) -> None:
    folder = spoil_manifest(exported("dim").bundle, tmp_path / "b", lambda manifest: None)
    file = folder / "golden" / "denoise_image.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    bundle = open_bundle(folder)
    assert "is not the file that the manifest signs" in refusal(
        Model(bundle, OrtBackend(bundle, threads=1)), "denoise_image"
    )
