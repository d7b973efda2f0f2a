"""The training losses: finite terms for every task and kind of model, the right tokens in them, and the masks of a
selecting model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mdm.reference import Tokenizer, load_config, loss
from mdm.reference.checkpoint import build_model
from mdm.reference.data import Folder, Rows, World
from mdm.reference.dim import DiM
from mdm.reference.loss import PAD_WEIGHT, Weights, dim_loss, draw_times, mdm_loss, text_weights, training_mask
from mdm.reference.multimodal import MDM
from mdm.reference.muon import orthogonal
from mdm.reference.schedule import CosineSchedule
from mdm.reference.tasks import TASKS
from mdm.reference.train import Phase, Recipe, Trainer

Tiny = Callable[..., dict[str, Any]]
Make = Callable[..., MDM]
Figure = Callable[[str, float, float], None]


@pytest.fixture(scope="module")
def world(tiny: Tiny, tokenizer: Tokenizer) -> World:
    return World(load_config(tiny()), tokenizer)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_for(world: World, task: str, count: int = 6) -> Rows:
    return world.draw([task] * count, 20 if TASKS[task].text else 0, seeded())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("kinds", [("x0", "v"), ("eps", "eps"), ("v", "x0")])
def test_every_task_has_finite_terms_and_gradients(
    tiny: Tiny, tiny_model: Make, world: World, task: str, keep: float, kinds: tuple[str, str]
) -> None:
    model = tiny_model(keep=keep, predict_text=kinds[0], predict_image=kinds[1]).requires_grad_(True)
    model.vae.requires_grad_(False)
    total, terms = mdm_loss(model, rows_for(world, task), Weights(), seeded(1))
    total.backward()
    kind = TASKS[task]
    expected = {"se"} | ({"text", "ce"} if kind.makes_text else set()) | ({"image"} if kind.makes_image else set())
    assert terms.keys() == expected
    assert all(math.isfinite(value) and value >= 0 for value in terms.values())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in gradients.values())
    assert gradients["latent_out.weight"].abs().sum() > 0
    assert not any(name.startswith("vae.") for name in gradients)
    scale = {"text": 1.0, "ce": 1.0, "image": 8.0, "se": 1.0}
    assert float(total.detach()) == pytest.approx(sum(scale[name] * value for name, value in terms.items()), rel=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_only_generated_tokens_count(
    tiny_model: Make, world: World, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network that says something else at given tokens has the same loss."""
    model, rows = tiny_model(), rows_for(world, task)
    expected = mdm_loss(model, rows, Weights(), seeded(1))[1]
    predict = MDM.predict

    def noisy(self: MDM, *arguments: Any) -> Tensor:
        output = predict(self, *arguments)
        return torch.where(rows.given[..., None], output + 100, output)

    monkeypatch.setattr(MDM, "predict", noisy)
    assert mdm_loss(model, rows, Weights(), seeded(1))[1] == pytest.approx(expected, rel=1e-5)


def test_the_truth_has_no_loss(tiny_model: Make, world: World, monkeypatch: pytest.MonkeyPatch, figure: Figure) -> None:
    """A network that knows the latent scores 0 in every noise term; given the draws, the noise is (z - a z0) / s."""
    model, rows = tiny_model(), rows_for(world, "joint")
    z0 = torch.cat([model.vae.encode_text(rows.ids), model.vae.encode_image(rows.pictures[:, 0])], 1)

    def knowing(self: MDM, z: Tensor, t: Tensor, text_tokens: int, *_: Any) -> Tensor:
        a, s = self.levels(t, text_tokens, z.shape[1])
        return torch.cat([z0[:, :20], ((z - a * z0) / s * a - s * z0)[:, 20:]], 1)  # x0 for text, v for the picture

    monkeypatch.setattr(MDM, "predict", knowing)
    terms = mdm_loss(model, rows, Weights(), seeded(1))[1]
    for name in ("text", "image", "se"):
        figure(f"{name} loss of the truth", terms[name], 1e-6)


def test_flat_patches_count_less(tiny_model: Make, world: World) -> None:
    """The image term is the mean of its tokens' errors, a flat one weighted by `flat`: linear in 1 / sum of weights."""
    model, rows = tiny_model(), rows_for(world, "class_to_image")
    flat = (model.vae.patchify(rows.pictures[:, 0]).std(-1) < 0.02).float().mean()
    assert 0.1 < flat < 0.95

    def image(weight: float) -> float:
        return mdm_loss(model, rows, Weights(flat=weight), seeded(1))[1]["image"]

    busy, all_alike = image(0.0), image(1.0)  # the mean over busy patches, and over all
    others = (all_alike - (1 - float(flat)) * busy) / float(flat)
    share = 0.3 * float(flat) / (0.3 * float(flat) + 1 - float(flat))
    assert image(0.3) == pytest.approx(share * others + (1 - share) * busy, rel=1e-4)


def test_a_selecting_model_trains_half_of_its_steps_under_a_mask(
    tiny_model: Make, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Tensor] = []

    def noted(*arguments: Any) -> Tensor:
        masks.append(training_mask(*arguments))
        return masks[-1]

    monkeypatch.setattr(loss, "training_mask", noted)
    rows = rows_for(world, "ask", 3)
    for seed in range(60):
        mdm_loss(tiny_model(keep=0.5), rows, Weights(), seeded(seed))
    assert 15 <= len(masks) <= 45
    made = ~rows.given
    for mask in masks:
        assert mask[rows.given].all()
        assert (mask * made).sum(1).tolist() == [math.ceil(0.5 * int(row.sum())) for row in made]
    assert any(not torch.equal(mask, masks[0]) for mask in masks)
    count = len(masks)
    mdm_loss(tiny_model(keep=1.0), rows, Weights(), seeded(0))
    assert len(masks) == count


@pytest.mark.parametrize("shift", [0.25, 3.0])
@pytest.mark.parametrize("drawn", [0.25, 1.0, 3.0])
def test_training_times_are_uniform_in_the_schedule_they_are_drawn_for(
    shift: float, drawn: float, figure: Figure
) -> None:
    schedule, wanted = CosineSchedule(shift), CosineSchedule(drawn)
    t = draw_times(schedule, drawn, 1000, seeded())
    assert t.dtype == torch.float64
    assert 1e-4 <= t.min() < t.max() <= 1 - 1e-4
    uniform = wanted.time_of_lam(schedule.lam(t)).sort().values
    figure(
        f"times drawn for {drawn} in {shift}", float((uniform - (torch.arange(1000) + 0.5) / 1000).abs().max()), 2e-3
    )
    assert not torch.equal(t, t.sort().values)
    assert draw_times(schedule, drawn, 1, seeded()).shape == (1,)


# --------------------------------------------------------------------------------------------------- DiM


def test_dim_trains_from_a_folder(tiny: Tiny, tmp_path: Any, figure: Figure) -> None:
    config = load_config(tiny(family="dim", in_channels=4))
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.full((4, 8, 8), i - 1, np.float32))
    (tmp_path / "captions.jsonl").write_text("\n".join(f'{{"file": "{i}.npy", "class": {i}}}' for i in range(3)))
    torch.manual_seed(0)
    model = build_model(config)
    assert isinstance(model, DiM)
    rows = Folder(tmp_path, config, None).draw(["class_to_image"] * 4, 0, seeded())
    value, terms = dim_loss(model, rows, seeded())
    assert terms == {"image": pytest.approx(float(value.detach()))}

    run = Trainer(model, Folder(tmp_path, config, None), Recipe((Phase(40),), batch=16, lr=3e-3, warmup=5), 0)
    logs: list[float] = []
    run.run(lambda phase, step, of, losses: logs.append(losses["image"]))
    figure("DiM loss of steps 31-40, share of steps 1-10", sum(logs[-10:]) / sum(logs[:10]), 0.9)
    run.export(tmp_path / "dim.safetensors", config)


# -------------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (64, 64), (1, 5)])
def test_orthogonal_brings_all_singular_values_near_one(shape: tuple[int, int], figure: Figure) -> None:
    x = torch.randn(5, *shape, generator=seeded()) * torch.tensor([1e-3, 1, 1e3, 1, 1])[:, None, None]
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    q = orthogonal(x)
    strong = s / s.norm(dim=-1, keepdim=True) > 0.01  # five rounds do not lift what is almost singular
    values = torch.einsum("nri,nrc,nic->ni", u, q, vt)[strong]  # on the singular vectors of x themselves
    figure(f"orthogonal {shape}: 1 - the least", 1 - float(values.min()), 0.4)
    figure(f"orthogonal {shape}: the largest - 1", float(values.max()) - 1, 0.3)
    rest = q - torch.einsum("nri,ni,nic->nrc", u, torch.einsum("nri,nrc,nic->ni", u, q, vt), vt)
    figure(f"orthogonal {shape}: off the singular vectors", float(rest.abs().max()), 1e-3)


def test_orthogonal_of_nothing_is_nothing() -> None:
    assert orthogonal(torch.zeros(2, 3, 4)).eq(0).all()


@pytest.mark.parametrize("prompt", [[5, 6, 7], [0, 0, 0]], ids=["prompt", "hidden prompt"])
def test_text_weights_end_at_the_first_generated_pad(prompt: list[int]) -> None:
    """Pads in a hidden prompt's place are given: they neither count nor end the text behind them."""
    ids, given = torch.tensor([[*prompt, 8, 9, 0, 0, 0]]), torch.tensor([[True] * 3 + [False] * 5])
    assert text_weights(ids, given)[0].tolist() == pytest.approx([0, 0, 0, 1, 1, 1, PAD_WEIGHT, PAD_WEIGHT])
