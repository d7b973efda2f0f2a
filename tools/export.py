"""`mdm export`: a checkpoint becomes a bundle."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mdm.tools.options import FILE, json_option, print_json


@click.command("export")
@click.argument("checkpoint", type=FILE)
@click.option("-o", "--out", type=FILE, required=True, help="Folder of the bundle.")
@click.option("--config", required=True, help="A preset (dim-huge-256, mdm-tiny, ...) or a JSON file with a config.")
@click.option("--precision", default="fp32", show_default=True, help="fp32, fp16 or bf16.")
@click.option("--opset", type=int, help="ONNX opset, 20 to 25. Default: 20, for bf16 22.")
@click.option(
    "--image-size",
    "image_sizes",
    type=int,
    multiple=True,
    help="Graphs for this size too, in the unit of the config's image_size: pixels, or latents.",
)
@click.option(
    "--upsample", type=int, multiple=True, help="Graphs at this many times image_size, with upsample guidance (DiM)."
)
@click.option("--fp32-layers", multiple=True, help="Keep float32 where the module path fits: 'backbone.blocks.48.*'.")
@click.option("--tokenizer", type=FILE, help="SentencePiece model. Default: CHECKPOINT's .tokenizer.model.")
@click.option("--autoencoder", type=FILE, help="Image autoencoder of a latent DiM (AutoencoderKL).")
@click.option("--latent-scale", type=float, help="Scale factor of that autoencoder's latents. Default: 0.18215.")
@click.option("--no-validate", is_flag=True, help="Do not run the model: no validation, no golden outputs.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@json_option
def command(
    checkpoint: Path,
    out: Path,
    config: str,
    precision: str,
    opset: int | None,
    image_sizes: tuple[int, ...],
    upsample: tuple[int, ...],
    fp32_layers: tuple[str, ...],
    tokenizer: Path | None,
    autoencoder: Path | None,
    latent_scale: float | None,
    no_validate: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write a bundle: ONNX graphs, weights, sampler tables and golden outputs, proven against the PyTorch model."""
    from mdm.export import export_bundle
    from mdm.runtime.bundle import open_bundle

    start = time.monotonic()
    phases: dict[str, float] = {}
    console = Console(stderr=True)
    with console.status("") as status:

        def report(phase: str, seconds: float | None) -> None:
            if seconds is None:
                status.update(f"{phase} ({time.monotonic() - start:.0f} s so far)")
                return
            phases[phase] = round(seconds, 3)
            if not as_json:
                console.print(f"{phase:16} {seconds:8.1f} s", highlight=False)

        export_bundle(
            checkpoint, config, out, precision=precision, opset=opset, image_sizes=image_sizes, upsample=upsample,
            fp32_layers=fp32_layers, tokenizer=tokenizer, autoencoder=autoencoder, latent_scale=latent_scale,
            validate=not no_validate, force=force, report=report,
        )  # fmt: skip
    manifest = open_bundle(out).manifest
    size = sum(file["size"] for file in manifest["files"].values())
    if as_json:
        print_json({"bundle": str(out), "bytes": size, "phases": phases, "validation": manifest["validation"]})
        return
    click.echo(f"{out}: {len(manifest['graphs'])} graphs, {size / 1e6:.1f} MB, {said_of(manifest['validation'])}")


def said_of(validation: dict[str, Any]) -> str:
    """The outcome of validation in a few words."""
    graphs = validation.get("graphs")
    if validation["state"] != "passed" or not graphs:
        return f"not validated ({validation.get('reason', 'no reason given')})"
    name, worst = max(graphs.items(), key=lambda item: item[1]["error"])
    limit = validation.get("limit", "not told")
    by = validation.get("by", "a runtime that is not told")
    return f"validated by {by}: off by at most {worst['error']:.1e} of the largest value, in {name} (limit {limit})"
