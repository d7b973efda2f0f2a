"""Runs of every task on random weights: what is given stays, guidance drops the right thing, selection keeps j."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference import Result, Tokenizer
from mdm.reference.generate import generate
from mdm.reference.multimodal import MDM
from mdm.reference.solvers import SOLVERS
from mdm.reference.tasks import TASKS, make_request

Make = Callable[..., MDM]
Figure = Callable[[str, float, float], None]


def shown(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


INPUTS: dict[str, dict[str, Any]] = {
    "class_to_image": {"classes": [2, 0]},
    "text_to_image": {"prompts": ["two big red circles on the left", "one small blue cross at the top"]},
    "caption": {"pictures": shown()},
    "ask": {"prompts": ["what colour?", "where?"], "pictures": shown()},
    "complete": {"prompts": ["two big red", "one small blue cross at the top. where?"]},
    "joint": {"batch": 2},
    "turn": {"prompts": ["two big red circles on the left. now blue"] * 2, "pictures": shown()},
}


@dataclass
class Call:
    """One evaluation of the network, as it was asked for."""

    z: Tensor
    y: Tensor
    mask: Tensor | None


def spy(model: MDM) -> list[Call]:
    """Every later evaluation of the model is noted in the list."""
    calls: list[Call] = []

    def note(_: object, args: tuple[Any, ...]) -> None:
        z, _, _, _, y, mask = args
        calls.append(Call(z.clone(), y.clone(), None if mask is None else mask.clone()))

    model.register_forward_pre_hook(note)
    return calls


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_and_leaves_given_tokens_untouched(tiny_model: Make, tokenizer: Tokenizer, task: str) -> None:
    model = tiny_model()
    calls = spy(model)
    result = generate(model, tokenizer, task, **INPUTS[task])
    request = make_request(model, tokenizer, task, **INPUTS[task])
    assert len(result.texts) == (2 if TASKS[task].makes_text else 0)
    assert (result.pictures is not None) == TASKS[task].makes_image
    if result.pictures is not None:
        assert result.pictures.shape == (2, 3, 32, 32)
        assert result.pictures.abs().max() <= 1
    assert result.latents.isfinite().all()
    assert result.latents.dtype == torch.float32
    assert not result.latents.requires_grad
    assert torch.equal(result.latents[request.given], request.clean[request.given])
    assert len(calls) == 3
    for call in calls:  # the network always sees them clean, whatever the solver did to its own copy
        assert torch.equal(call.z[:2][request.given], request.clean[request.given])


def test_texts_are_what_follows_the_prompt_and_the_new_picture_is_the_lower(
    tiny_model: Make, tokenizer: Tokenizer
) -> None:
    model = tiny_model()
    result = generate(model, tokenizer, "turn", **INPUTS["turn"])
    ids = model.vae.decode_text(result.latents[:, :20]).argmax(-1)
    assert result.texts == [tokenizer.decode(row[10:].tolist()) for row in ids]
    assert result.pictures is not None
    assert torch.equal(result.pictures, model.vae.decode_image(result.latents[:, 36:], 4).clamp(-1, 1))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m_sde", "euler-maruyama"])
def test_a_seed_decides_everything(tiny_model: Make, tokenizer: Tokenizer, solver: str) -> None:
    def run(seed: int) -> Tensor:
        return generate(tiny_model(), tokenizer, "joint", batch=2, seed=seed, solver=solver).latents

    torch.manual_seed(11)
    first = run(5)
    torch.manual_seed(12)  # the global generator has no say
    assert torch.equal(run(5), first)
    assert not torch.allclose(run(6), first)
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_runs(tiny_model: Make, tokenizer: Tokenizer, solver: str) -> None:
    result = generate(tiny_model(), tokenizer, "joint", batch=1, solver=solver, steps=4)
    assert result.latents.isfinite().all()


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_does_not_depend_on_its_batch(
    tiny_model: Make, tokenizer: Tokenizer, task: str, figure: Figure
) -> None:
    model, inputs = tiny_model(), INPUTS[task]
    if task == "complete":
        inputs = {"prompts": ["two big red", "where?"]}  # one segment length for both
    noise = torch.randn(make_request(model, tokenizer, task, **inputs).clean.shape)

    def run(part: slice) -> Result:
        some: dict[str, Any] = {name: 1 if name == "batch" else value[part] for name, value in inputs.items()}
        return generate(model, tokenizer, task, noise=noise[part], **some)

    both = generate(model, tokenizer, task, noise=noise, **inputs)
    alone = [run(slice(0, 1)), run(slice(1, 2))]
    apart = torch.cat([result.latents for result in alone])
    figure(f"a sample alone, {task}", float((apart - both.latents).norm() / both.latents.norm()), 1e-5)
    assert both.texts == [text for result in alone for text in result.texts]


# ---------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("task", TASKS)
def test_guidance_asks_again_without_what_the_task_drops(tiny_model: Make, tokenizer: Tokenizer, task: str) -> None:
    model, inputs = tiny_model(), INPUTS[task]
    if task in ("joint", "text_to_image"):
        inputs = inputs | {"classes": [1, 3]}
        inputs.pop("batch", None)
    if TASKS[task].drops == "text":
        inputs = inputs | {"negative": ["green", "black"]}
    calls = spy(model)
    generate(model, tokenizer, task, guidance=2.0, **inputs)
    request = make_request(model, tokenizer, task, **inputs)
    if not TASKS[task].drops:
        assert {len(call.z) for call in calls} == {2}
        return
    for call in calls:
        told, untold = call.z.chunk(2)
        assert torch.equal(told[~request.given], untold[~request.given])
        assert torch.equal(untold[request.given], request.unguided_clean[request.given])
        expected = request.y.tolist() + ([4, 4] if TASKS[task].drops == "class" else request.y.tolist())
        assert call.y.tolist() == expected


def test_guidance_0_is_no_guidance(tiny_model: Make, tokenizer: Tokenizer, figure: Figure) -> None:
    model = tiny_model()

    def run(scale: float) -> Tensor:
        return generate(model, tokenizer, "class_to_image", classes=[1, 2], guidance=scale).latents

    calls = spy(model)
    off = run(0.0)
    assert {len(call.z) for call in calls} == {2}
    figure("guidance 1e-9 against none", float((run(1e-9) - off).abs().max()), 1e-4)
    assert not torch.allclose(run(1.5), off, atol=1e-2)


def test_guidance_is_linear_in_its_scale_for_one_evaluation(tiny_model: Make, tokenizer: Tokenizer) -> None:
    """With one DDIM step the latent is linear in eps, so its three values at scales 0, 1, 2 stand on a line."""
    model = tiny_model()
    at = [
        generate(model, tokenizer, "class_to_image", classes=[1], guidance=scale, steps=1).latents
        for scale in (0.0, 1.0, 2.0)
    ]
    torch.testing.assert_close(at[2] - at[1], at[1] - at[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(at[1], at[0], atol=1e-3)


# --------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("keep", [0.3, 0.5])
def test_selection_starts_with_all_and_then_keeps_exactly_j(
    tiny_model: Make, tokenizer: Tokenizer, task: str, keep: float
) -> None:
    """Two estimates make a mask, so the first two evaluations select all."""
    model = tiny_model(keep=keep)
    calls = spy(model)
    generate(model, tokenizer, task, steps=5, **INPUTS[task])
    given = make_request(model, tokenizer, task, **INPUTS[task]).given
    assert [call.mask is None for call in calls] == [True, True, False, False, False]
    masks = [call.mask for call in calls if call.mask is not None]
    for mask in masks:
        assert len(mask) == len(calls[0].z)
        for row, known in zip(mask, given.repeat(len(mask) // 2, 1), strict=True):
            assert set(row.tolist()) <= {0.0, 1.0}
            assert row[known].all()
            assert int(row[~known].sum()) == math.ceil(round(keep * int((~known).sum()), 6))
        assert torch.equal(mask[:2], mask[-2:])  # guidance's two halves share it


def test_a_selection_of_all_tokens_changes_no_bit(tiny_model: Make, tokenizer: Tokenizer) -> None:
    def run(keep: float) -> Tensor:
        return generate(tiny_model(keep=keep), tokenizer, "joint", batch=2, steps=5).latents

    assert torch.equal(run(0.999), run(1.0))  # ceil(0.999 * 24) = 24
    assert not torch.equal(run(0.5), run(1.0))


def test_a_run_remembers_nothing_of_the_run_before(tiny_model: Make, tokenizer: Tokenizer) -> None:
    model = tiny_model(keep=0.5)
    first, second = (generate(model, tokenizer, "joint", batch=2, steps=5).latents for _ in range(2))
    assert torch.equal(first, second)


# -------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("class_to_image", {"classes": [5, 0]}, "class ids reach from 0 to 5, expected 0 to 4"),
        ("class_to_image", {"classes": [-1, 0]}, "class ids reach from -1"),
        ("class_to_image", {"classes": [0.5, 0.0]}, "class ids"),
        ("joint", {"noise": torch.zeros(2, 23, 12)}, r"noise has shape \(2, 23, 12\), expected \(2, 24, 12\)"),
        ("joint", {"noise": torch.zeros(24, 12)}, r"noise has shape \(24, 12\)"),
        ("joint", {"solver": "dpmp_2m"}, "unknown solver 'dpmp_2m'; did you mean 'dpmpp_2m'?"),
        ("joint", {"steps": 0}, "0 steps"),
        ("joint", {"t_start": 1.0}, "t_start"),
        ("joint", {"spacing": "karas"}, "did you mean 'karras'?"),
        ("joint", {"nonsense": 3}, "nonsense"),
        ("joint", {"guidance": float("nan")}, "guidance"),
    ],
)
def test_wrong_input_is_told_in_three_lines(
    tiny_model: Make, tokenizer: Tokenizer, task: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said) as caught:
        generate(tiny_model(), tokenizer, task, **(INPUTS[task] | changes))
    assert len(str(caught.value).splitlines()) <= 3
