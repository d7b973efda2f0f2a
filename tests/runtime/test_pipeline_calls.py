"""Calls of a pipeline: the same bits in any company, noise that is given, callbacks, and facts that make it again."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import InputError
from mdm.runtime import Pipeline, Request, Result, load
from mdm.runtime.noise import normal
from mdm.runtime.pipeline import Step

from .against_reference import (
    PICTURES,
    PROMPTS,
    QUESTIONS,
    Array,
    Figure,
    Find,
)

# ---------------------------------------------------------------------------------------- alone and together


def requests_for(name: str) -> list[Request]:
    """Different tasks, solvers, steps, guidance, text lengths and sizes; some share a lane, some change theirs."""
    if name == "dim":
        return [
            Request.of("class_to_image", **fields)
            for fields in (
                {"seed": 1, "label": 2, "steps": 9}, {"seed": 2, "steps": 5, "solver": "heun"},
                {"seed": 3, "label": 0, "guidance": 0.0, "steps": 4}, {"seed": 4, "label": 1, "size": 12, "steps": 7},
                {"seed": 5, "label": 1, "upsample": 2, "steps": 10}, {"seed": 6, "upsample": 2, "steps": 6},
                {"seed": 1, "label": 2, "steps": 9, "solver": "euler-maruyama", "sample": 3},
                {"seed": 7, "label": 2, "size": 16, "guidance": 1.0, "steps": 6},
            )
        ]  # fmt: skip
    long = "two big red circles on the left at the top"
    return [
        Request.of("text_to_image", prompt=PROMPTS[0], seed=1, steps=5),
        Request.of("text_to_image", prompt=PROMPTS[1], seed=2, steps=3, solver="heun", guidance=4.0),
        Request.of("text_to_image", prompt=PROMPTS[2], seed=2, steps=6, solver="dpmpp_2m_sde", sample=1),
        Request.of("text_to_image", prompt=long, seed=1, negative="red", steps=4),
        Request.of("text_to_image", prompt=PROMPTS[0], seed=3, guidance=0.0, steps=5),
        Request.of("joint", seed=4, label=1, steps=6, solver="euler-maruyama"),
        Request.of("joint", seed=5, steps=2, solver="dim"),
        Request.of("caption", picture=PICTURES[0], seed=6, steps=4),
        Request.of("ask", picture=PICTURES[1], prompt=QUESTIONS[1], seed=7, steps=3),
        Request.of("complete", prompt="two big", seed=8, steps=4),
        Request.of("turn", picture=PICTURES[2], prompt=PROMPTS[1], seed=9, steps=3),
        Request.of("class_to_image", label=2, seed=10, steps=5),
    ]


def bits(results: list[Result]) -> list[tuple[bytes, bytes | None, str | None]]:
    return [
        (result.latents.tobytes(), None if result.picture is None else result.picture.tobytes(), result.text)
        for result in results
    ]


@pytest.mark.parametrize("name", ["mdm", "keep", "dim", "shipped"])
def test_the_same_bits_alone_and_in_any_company(name: str, deployed: Find) -> None:
    case, requests = deployed(name), requests_for(name)
    few = name == "shipped"
    requests = requests[:3] + requests[5:8] if few else requests
    one = Pipeline(case.pipeline.model, batch=1)
    alone = [bits(one.run([request]))[0] for request in requests]
    assert len(set(alone)) == len(alone)
    places = list(range(len(requests)))
    shuffled = random.Random(0).sample(places, len(places))
    for threads, batches in ((1, (3, 8) if few else (1, 2, 3, 8)), (2, (8,) if few else (2, 8))):
        model = case.pipeline.model if threads == 1 else case.load(threads=threads).model
        for batch in batches:
            pipeline = Pipeline(model, batch)
            for order in (places, shuffled):
                together = bits(pipeline.run([requests[i] for i in order]))
                assert together == [alone[i] for i in order], (batch, threads, order)


def test_samples_of_a_seed_are_counted_on(deployed: Find) -> None:
    pipeline = deployed("mdm").pipeline
    many = pipeline.joint(seed=[3, 4], batch=3, steps=2)
    assert [(one.request.seed, one.request.sample) for one in many] == [(s, n) for s in (3, 4) for n in range(3)]
    assert len(set(bits(many))) == 6
    assert bits(pipeline.joint(seed=4, sample=1, batch=2, steps=2)) == bits(many[4:])


def test_results_are_nobody_elses_memory(deployed: Find) -> None:
    """What came out stays as it is whatever runs later in the same lanes, or is written into it."""
    pipeline = deployed("mdm").pipeline
    first = pipeline.joint(seed=1, batch=3, steps=3)
    before = bits(first)
    for result in pipeline.joint(seed=2, batch=3, steps=3):
        result.latents[...] = np.nan
        assert result.picture is not None
        result.picture[...] = 0
    assert bits(first) == before
    assert bits(pipeline.joint(seed=1, batch=3, steps=3)) == before


# ------------------------------------------------------------------------------------------------ noise


def test_given_noise_is_the_start(deployed: Find) -> None:
    pipeline = deployed("mdm").pipeline
    seeded = pipeline.generate(PROMPTS[:2], seed=[3, 4])
    noises = [normal(seed, 0, 0, (24, 12)) for seed in (3, 4)]
    given = pipeline.generate(PROMPTS[:2], seed=99, noise=noises)
    assert bits(given) == bits(seeded)
    doubles = pipeline.generate(PROMPTS[:2], noise=[noise.astype(np.float64) for noise in noises])
    assert bits(doubles) == bits(seeded)
    assert all(np.array_equal(noise, normal(seed, 0, 0, (24, 12))) for noise, seed in zip(noises, (3, 4), strict=True))


def test_given_noise_leaves_a_stochastic_solvers_own_to_the_seed(deployed: Find) -> None:
    pipeline, noise = deployed("mdm").pipeline, normal(1, 0, 0, (24, 12))
    settings: dict[str, Any] = {"noise": noise, "solver": "dpmpp_2m_sde", "steps": 4}
    first, again, other = (pipeline.joint(seed=seed, **settings) for seed in (1, 1, 2))
    assert bits(first) == bits(again) != bits(other)
    assert bits(first) == bits(pipeline.joint(seed=1, solver="dpmpp_2m_sde", steps=4))


@pytest.mark.parametrize(
    "noise",
    [
        np.zeros((24, 11)), np.zeros((1, 24, 12)), np.zeros((24, 12), int), np.zeros((24, 12), complex), "noise", 3.0,
        np.full((24, 12), np.nan), np.full((24, 12), np.inf), np.full((24, 12), 1e39),  # beyond float32
    ],
    ids=lambda noise: f"{np.asarray(noise).dtype}{np.asarray(noise).shape}",
)  # fmt: skip
def test_wrong_noise_is_refused(noise: Any, deployed: Find) -> None:
    with pytest.raises(InputError, match=r"noise is .*, expected finite float32 \[24, 12\]"):
        deployed("mdm").pipeline.joint(noise=noise)


# --------------------------------------------------------------------------------------------- callbacks


def test_a_callback_is_told_of_every_evaluation(deployed: Find) -> None:
    pipeline, requests, steps = deployed("mdm").pipeline, requests_for("mdm"), []
    assert bits(pipeline.run(requests, steps.append)) == bits(pipeline.run(requests))
    for index, request in enumerate(requests):
        mine = [step for step in steps if step.index == index]
        evaluations = (2 if request.sampler.get("solver") == "heun" else 1) * request.sampler["steps"]
        assert [(step.done, step.of) for step in mine] == [(n + 1, evaluations) for n in range(evaluations)]
        assert all(step.prepared.request is request for step in mine)
        shapes = {step.x0.shape for step in mine}
        assert shapes == {mine[0].prepared.shape.latents}
        assert len({step.x0.tobytes() for step in mine}) == evaluations  # each its own copy


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "dpm_3s"])
def test_the_last_estimate_is_the_result(solver: str, deployed: Find, figure: Figure) -> None:
    """With a last step of first order to time 0 what is left of the latents is x0 itself."""
    last: dict[int, Array] = {}

    def watch(step: Step) -> None:
        last[step.index] = step.x0

    worst = 0.0
    for name, size in (("mdm", None), ("dim", 12)):
        pipeline = deployed(name).pipeline
        results = pipeline.generate(
            label=[1, 2], guidance=[0.0, 1.5], size=size, solver=solver, steps=[7, 8], t_end=1e-3, final_zero=True,
            callback=watch,
        )  # fmt: skip
        for index, result in enumerate(results):
            worst = max(worst, float(np.abs(last[index] - result.latents).max() / np.abs(result.latents).max()))
    figure(f"last x0 of {solver} against its result", worst, 1e-5 if solver != "heun" else 1e-2)


@pytest.mark.parametrize("error", [ValueError, InputError, KeyboardInterrupt, SystemExit])
def test_what_a_callback_raises_ends_the_call_alone(error: type[BaseException], deployed: Find) -> None:
    pipeline, requests = deployed("mdm").load(batch=3), requests_for("mdm")
    before = bits(pipeline.run(requests))
    for at in (1, 4):
        seen = []

        def watch(step: Step, at: int = at, seen: list[Step] = seen) -> None:
            seen.append(step)
            if step.index == 2 and step.done == at:
                raise error("enough")

        with pytest.raises(error, match="enough"):
            pipeline.run(requests, watch)
        assert seen[-1].index == 2 or error not in (KeyboardInterrupt, SystemExit)
        assert not any(lane.jobs for lane in pipeline.lanes.made.values())
        assert bits(pipeline.run(requests)) == before


# ----------------------------------------------------------------------------------------------- facts


def again(pipeline: Pipeline, result: Result) -> Result:
    """What a result's facts alone, passed through JSON, come to. Pictures are not part of them."""
    facts = json.loads(json.dumps(result.facts()))
    outcome = {name: facts.pop(name, None) for name in ("text", "evaluations", "seconds")}
    assert outcome["text"] == result.text
    assert outcome["evaluations"] == result.evaluations
    [made] = pipeline.run([Request.of(**facts, picture=result.request.picture)])
    return made


@pytest.mark.parametrize("name", ["mdm", "dim", "latent"])
def test_facts_are_enough_to_make_the_same_again(name: str, deployed: Find) -> None:
    pipeline = deployed(name).pipeline
    requests = requests_for("mdm" if name == "mdm" else "dim")
    if name == "latent":
        requests = [dataclasses.replace(one, size=16) for one in requests if one.upsample is None]
    results = pipeline.run(requests)
    made = [again(pipeline, result) for result in results]
    assert bits(made) == bits(results)
    assert [one.facts() | {"seconds": 0} for one in made] == [one.facts() | {"seconds": 0} for one in results]


def test_facts_of_another_default_still_make_the_same(deployed: Find, spoil: Callable[..., Path]) -> None:
    """Every setting is pinned: a bundle that is meant to be used otherwise makes the same picture of them."""
    results = deployed("mdm").pipeline.run(requests_for("mdm"))

    def change(manifest: dict[str, Any], folder: Any) -> None:
        manifest["sampler"] |= {"solver": "dpmpp_3m", "steps": 7, "guidance": 0.3, "spacing": "karras", "t_end": 0.1,
                                "final_zero": True, "order": 2, "solver_type": "heun"}  # fmt: skip

    other = load(spoil("mdm", change), threads=1)
    assert other.joint()[0].sampler["solver_type"] == "heun"
    assert bits([again(other, result) for result in results]) == bits(results)


def test_times_add_up(deployed: Find) -> None:
    results = deployed("mdm").load(batch=1).joint(seed=[1, 2, 3], steps=3)
    assert all(result.seconds > 0 and result.waited >= 0 for result in results)
    assert results[2].waited >= results[0].seconds + results[1].seconds
