"""The trainer: the same seed gives the same bits, also when stopped; its averages, its files, and that loss falls."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference import Tokenizer, load_config, load_model
from mdm.reference.checkpoint import build_model
from mdm.reference.data import World
from mdm.reference.loss import Weights
from mdm.reference.multimodal import MDM
from mdm.reference.train import RECIPES, Phase, Recipe, Trainer, train_vae, vae_quality

Tiny = Callable[..., dict[str, Any]]
Figure = Callable[[str, float, float], None]
TINY = replace(RECIPES["mdm-tiny"], batch=8, vae_steps=4, warmup=2)
SHORT = replace(TINY, phases=(Phase(3, 1.0, 0.3), Phase(3, 0.6, 0.0, Weights(flat=0.5))))


def silent(phase: str, step: int, of: int, losses: Mapping[str, float]) -> None:
    pass


@pytest.fixture(scope="module")
def world(tiny: Tiny, tokenizer: Tokenizer) -> World:
    return World(load_config(tiny()), tokenizer)


@pytest.fixture
def trainer(tiny: Tiny, world: World) -> Callable[..., Trainer]:
    """trainer(recipe, seed, keep=0.5, ...): a fresh Trainer on the picture world."""

    def fresh(recipe: Recipe = SHORT, seed: int = 0, **changes: Any) -> Trainer:
        torch.manual_seed(seed)
        return Trainer(build_model(load_config(tiny(**changes))), world, recipe, seed)

    return fresh


def content(trainer: Trainer) -> dict[str, Tensor]:
    """Everything a run is: weights, averages, optimizer states."""
    flat = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    flat |= {f"ema.{name}": tensor for name, tensor in trainer.ema.items()}
    for i, optimizer in enumerate(trainer.optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            flat |= {f"optimizer.{i}.{j}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return flat


def differing(one: Trainer, two: Trainer) -> list[str]:
    a, b = content(one), content(two)
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def whole_run(trainer: Trainer, state: Path | None = None) -> Trainer:
    assert isinstance(trainer.model, MDM)
    train_vae(trainer.model, trainer.data, trainer.recipe, trainer.seed, silent)
    trainer.run(silent, state, save_every=2)
    return trainer


# ----------------------------------------------------------------------------------- the same bits again


def test_a_seed_decides_every_bit(trainer: Callable[..., Trainer]) -> None:
    first = whole_run(trainer())
    torch.rand(7)  # the global generator has no say after the model is built
    assert differing(first, whole_run(trainer())) == []
    assert len(differing(first, whole_run(trainer(seed=1)))) > 50


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_stopped_run_goes_on_as_if_it_never_had(trainer: Callable[..., Trainer], tmp_path: Path, stop: int) -> None:
    state = tmp_path / "run.state"
    expected = whole_run(trainer())

    def stopping(phase: str, step: int, of: int, losses: Mapping[str, float]) -> None:
        if step == stop:
            raise KeyboardInterrupt

    stopped = trainer()
    assert isinstance(stopped.model, MDM)
    train_vae(stopped.model, stopped.data, SHORT, 0, silent)
    stopped.save(state)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(stopping, state, save_every=2)

    torch.manual_seed(99)
    again = trainer(seed=0)
    for weight in again.model.state_dict().values():
        weight.zero_()  # everything must come from the file
    again.resume(state)
    assert again.step == (stop - 1) // 2 * 2
    again.run(silent, state, save_every=2)
    assert differing(expected, again) == []


def test_a_killed_save_leaves_the_old_state(
    trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, run = tmp_path / "run.state", trainer()
    run.save(state)
    before = state.read_bytes()
    run.run(silent)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for broken in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, broken, killed)
            with pytest.raises(KeyboardInterrupt):
                run.save(state)
        assert state.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["run.state"]
    run.save(state)
    fresh = trainer()
    fresh.resume(state)
    assert fresh.step == 6


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("evil"),)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "wrong",
    ["empty", "text", "pickle", "tensor", "list", "keys", "step", "optimizer", "other config", "DiM's"],
)
def test_a_state_of_something_else_is_an_error(
    trainer: Callable[..., Trainer], tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.chdir(tmp_path)
    state, run = tmp_path / "run.state", trainer()
    sound: dict[str, Any] = {"step": 1, "model": run.model.state_dict(), "ema": run.ema}
    sound["optimizers"] = [optimizer.state_dict() for optimizer in run.optimizers]
    match wrong:
        case "empty" | "text" | "pickle":
            state.write_bytes({"empty": b"", "text": b"hello", "pickle": pickle.dumps(Evil(), 2)}[wrong])
        case "tensor" | "list" | "keys":
            torch.save({"tensor": torch.zeros(3), "list": [1, 2], "keys": {"step": 3}}[wrong], state)
        case "step" | "optimizer":
            torch.save(sound | ({"step": "x"} if wrong == "step" else {"optimizers": [3, 4]}), state)
        case "other config":
            trainer(width=48).save(state)
        case "DiM's":
            torch.save({"step": 1, "model": build_model(load_config(tiny(family="dim"))).state_dict()}, state)
    with pytest.raises(InputError, match=r"run\.state") as caught:
        run.resume(state)
    assert len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "evil").exists()


# --------------------------------------------------------------------------------------- what it computes


def test_the_average_warms_up(trainer: Callable[..., Trainer], figure: Figure) -> None:
    run, seen = trainer(replace(TINY, phases=(Phase(5),))), []
    start = {name: p.detach().clone().double() for name, p in run.trained.items()}
    run.run(lambda *_: seen.append({name: p.detach().clone().double() for name, p in run.trained.items()}))
    worst = 0.0
    for name, average in start.items():
        for n, weights in enumerate(seen):
            keep = min(0.9999, (1 + n) / (10 + n))
            average = keep * average + (1 - keep) * weights[name]
        worst = max(worst, float((average - run.ema[name]).abs().max()))
    figure("EMA against min(0.9999, (1+n)/(10+n))", worst, 1e-6)

    run.step = 10**6  # where the formula is above the cap
    name = next(iter(run.ema))
    run.ema[name].zero_()
    run.trained[name].detach().fill_(1)
    run.update_ema()
    figure("EMA at its cap", abs(float(run.ema[name].mean()) - 1e-4), 1e-8)


def test_the_loss_falls(trainer: Callable[..., Trainer], figure: Figure) -> None:
    run = trainer(replace(TINY, phases=(Phase(30),), batch=16, vae_steps=200, warmup=5, extra=()))
    assert isinstance(run.model, MDM)
    vae: list[float] = []
    train_vae(run.model, run.data, run.recipe, 0, lambda phase, step, of, losses: vae.append(losses["loss"]))
    figure("VAE loss after 200 steps, share of the start", vae[-1] / vae[0], 0.5)
    logs: list[Mapping[str, float]] = []
    run.run(lambda phase, step, of, losses: logs.append(dict(losses)))
    for term in ("image", "text", "ce"):
        first, last = (sum(log[term] for log in part) / 5 for part in (logs[:5], logs[-5:]))
        figure(f"{term} loss of steps 26-30, share of steps 1-5", last / first, 0.9)


def test_the_trained_autoencoder_is_measured_and_then_frozen(trainer: Callable[..., Trainer], figure: Figure) -> None:
    run = trainer(replace(TINY, vae_steps=50, phases=(Phase(2),)))
    model = run.model
    assert isinstance(model, MDM)
    train_vae(model, run.data, run.recipe, 0, silent)
    with torch.no_grad():
        pictures = run.data.pictures(500, torch.Generator().manual_seed(5))
        for name, latents in (
            ("image", model.vae.encode_image(pictures)),
            ("text", model.vae.encode_text(torch.arange(40))),
        ):
            flat = latents.flatten(0, -2)
            figure(
                f"{name} latents: mean of their channels",
                float(flat.mean(0).abs().max()),
                0.2 if name == "image" else 1e-5,
            )
            figure(f"{name} latents: |scale - 1|", abs(float((flat - flat.mean(0)).square().mean().sqrt()) - 1), 0.1)
    before = {name: tensor.clone() for name, tensor in model.vae.state_dict().items()}
    run.run(silent)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.vae.state_dict().items())
    quality = vae_quality(model, run.data, 0)
    assert quality["psnr"] > 0
    assert 0 <= quality["pieces"] <= 1


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 48, 256])
@pytest.mark.parametrize("recipe", [RECIPES["mdm-tiny"], Recipe()])
def test_every_task_of_the_mix_has_rows_in_every_step(
    trainer: Callable[..., Trainer], recipe: Recipe, batch: int
) -> None:
    run = trainer(replace(recipe, batch=batch))
    mix, total = run.batches()[0], sum(recipe.mix.values())
    assert set(mix) == set(recipe.mix)
    for task, share in recipe.mix.items():
        assert abs(mix.count(task) - batch * share / total) <= 1


def test_phases_follow_each_other() -> None:
    late = Weights(image=3.0)
    recipe = Recipe(phases=(Phase(10, 1.0, 0.5), Phase(5, 0.4, 0.0, late)), warmup=4)
    assert recipe.steps == 15
    rates = [recipe.at(step)[0] for step in range(15)]
    ramp = [1 - 0.05 * step for step in range(10)] + [0.4 - 0.08 * step for step in range(5)]
    assert rates == pytest.approx([r * min(1, (n + 1) / 4) for n, r in enumerate(ramp)])
    assert [recipe.at(step)[1].image for step in (0, 9, 10, 14)] == [8.0, 8.0, 3.0, 3.0]
    assert all(RECIPES["mdm-tiny"].at(n)[0] > 0 for n in range(RECIPES["mdm-tiny"].steps))
    for steps in (1, 2, 7, 300):
        short = recipe.scaled(steps)
        assert short.steps == steps
        assert abs(short.phases[0].steps - steps * 2 / 3) <= 0.5
        assert len([short.at(step) for step in range(steps)]) == steps


def test_extra_tasks_take_turns(trainer: Callable[..., Trainer]) -> None:
    run, seen = trainer(), []
    for step in range(6):
        run.step = step
        mix, extra = run.batches()
        assert set(mix) <= set(run.recipe.mix)
        seen.append(extra[0])
    assert seen == ["complete", "class_to_image", "turn"] * 2


def test_export_holds_the_averages_and_loads(trainer: Callable[..., Trainer], tiny: Tiny, tmp_path: Path) -> None:
    run = whole_run(trainer())
    run.export(tmp_path / "model.safetensors", run.model.config, seed="0")
    loaded = load_model(tmp_path / "model.safetensors", load_config(tiny())).state_dict()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(loaded[name], run.ema.get(name, tensor))
    assert not torch.equal(loaded["latent_out.weight"], run.model.state_dict()["latent_out.weight"])


def test_a_state_of_another_seed_is_an_error(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer().save(tmp_path / "a.state")
    with pytest.raises(InputError, match="begun with seed 0, not 1"):
        trainer(seed=1).resume(tmp_path / "a.state")
