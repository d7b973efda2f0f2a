"""`mdm train`: trains a preset on the picture world or on a folder, and goes on where a stopped run ended."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdm.tools.options import FILE, json_option, print_json, progress_bar

if TYPE_CHECKING:
    from mdm.reference.config import Config
    from mdm.reference.data import Data


@click.command("train")
@click.option("--preset", default="mdm-tiny", show_default=True, help="A preset's name, or a JSON file with a config.")
@click.option("-o", "--out", type=FILE, required=True, help="Checkpoint to write (.safetensors).")
@click.option(
    "--data", type=FILE, help="Folder of pictures with captions.jsonl. Default for mdm-tiny: the picture world."
)
@click.option(
    "--tokenizer", type=FILE, help="SentencePiece model. Default: trained on the folder's captions, beside OUT."
)
@click.option("--init", type=FILE, help="Checkpoint to start from; its autoencoder stays as it is.")
@click.option("--image-size", type=click.IntRange(1), help="Other picture side than the preset's.")
@click.option("--steps", type=click.IntRange(1), help="Diffusion steps. Default: the preset's recipe.")
@click.option("--vae-steps", type=click.IntRange(1), help="Autoencoder steps before. Default: the preset's recipe.")
@click.option("--batch", type=click.IntRange(1), help="Rows in a step. Default: the preset's recipe.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="Learning rate. Default: the preset's recipe.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same weights on the same machine.")
@json_option
def command(
    preset: str,
    out: Path,
    data: Path | None,
    tokenizer: Path | None,
    init: Path | None,
    image_size: int | None,
    steps: int | None,
    vae_steps: int | None,
    batch: int | None,
    lr: float | None,
    seed: int,
    as_json: bool,
) -> None:
    """Train a model, or go on with one: the state beside OUT is picked up if it is there."""
    import torch

    from mdm.plugins.errors import InputError
    from mdm.reference.checkpoint import build_model, load_model
    from mdm.reference.config import load_config
    from mdm.reference.multimodal import MDM
    from mdm.reference.train import RECIPES, Recipe, Trainer, train_vae, vae_quality

    if out.suffix != ".safetensors":
        raise InputError(f"--out is '{out}', expected a name that ends in .safetensors")
    config = load_config(preset)
    if image_size is not None:
        config = dataclasses.replace(config, image_size=image_size)
    recipe = RECIPES.get(preset, Recipe())
    if steps is not None:
        recipe = recipe.scaled(steps)
    changes: dict[str, Any] = {"vae_steps": vae_steps, "batch": batch, "lr": lr}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in changes.items() if value is not None})
    if lr is not None:
        recipe = dataclasses.replace(recipe, muon_lr=0.0)  # a rate given by hand is AdamW's
    source = _data(config, preset, data, tokenizer, init, out)

    state = out.with_suffix(".state")
    torch.manual_seed(seed)
    model = build_model(config) if init is None else load_model(init, config).train()
    trainer = Trainer(model, source, recipe, seed)
    with progress_bar(as_json) as bar:
        rows: dict[str, object] = {}

        def report(phase: str, step: int, of: int, losses: Mapping[str, float]) -> None:
            if phase not in rows:
                rows[phase] = bar.add_task(phase, total=of, note="")
            note = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
            bar.update(rows[phase], completed=step, note=note)  # type: ignore[arg-type]

        if state.is_file():
            trainer.resume(state)
        elif isinstance(model, MDM) and init is None:
            train_vae(model, source, recipe, seed, report)
            _keep_tokenizer(source, out)
            trainer.save(state)
        trainer.run(report, state)
    _keep_tokenizer(source, out)
    trainer.export(out, config, seed=str(seed), steps=str(trainer.step))
    result = {"checkpoint": str(out), "steps": trainer.step, "state": str(state)}
    if isinstance(model, MDM):
        result |= vae_quality(model, source, seed)
    if as_json:
        print_json(result)
    else:
        click.echo(f"{out}: {trainer.step} steps (training state in {state}, no longer needed)")


def _data(
    config: Config, preset: str, folder: Path | None, tokenizer: Path | None, init: Path | None, out: Path
) -> Data:
    """Where the rows come from, and the tokenizer that goes with them."""
    from mdm.plugins.errors import InputError
    from mdm.reference import SHIPPED_TOKENIZER, Tokenizer
    from mdm.reference.data import Folder, World, read_listing
    from mdm.reference.tokenizer import train_tokenizer

    if folder is None:
        if preset != "mdm-tiny":
            raise InputError(f"preset '{preset}' has no data of its own: give --data FOLDER")
        return World(config, Tokenizer(tokenizer or SHIPPED_TOKENIZER))
    if config.family == "dim":
        return Folder(folder, config, None)
    beside = [path.with_suffix(".tokenizer.model") for path in (init, out) if path is not None]
    shipped = [SHIPPED_TOKENIZER] if preset == "mdm-tiny" else []
    found = tokenizer or next((path for path in beside + shipped if path.is_file()), None)
    if found is None and init is not None:
        raise InputError(
            f"no tokenizer beside '{init}' ('{beside[0].name}')\ngive the one it was trained with: --tokenizer FILE"
        )
    if found is not None:
        return Folder(folder, config, Tokenizer(found))
    with tempfile.TemporaryDirectory() as place:  # see _keep_tokenizer
        captions = [item.caption for item in read_listing(folder, config.classes) if item.caption]
        train_tokenizer(captions, Path(place, "model"), config.vocabulary)
        return Folder(folder, config, Tokenizer(Path(place, "model")))


def _keep_tokenizer(source: Data, out: Path) -> None:
    """A checkpoint's tokenizer stands beside it, once the data has proved sound."""
    from mdm.reference.checkpoint import write_atomically
    from mdm.reference.data import Folder

    if isinstance(source, Folder) and source.tokenizer is not None:
        write_atomically(out.with_suffix(".tokenizer.model"), source.tokenizer.model.serialized_model_proto())
