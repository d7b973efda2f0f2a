"""`mdm bench step`: the project's claim of speed, without a checkpoint.

Models with random weights are exported, and a guided step of each is compared with its products alone and with PyTorch
(`compare.py`).
"""

from __future__ import annotations

import gc
import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from mdm.plugins.errors import InputError
from mdm.tools.bench.bundle import Deployed
from mdm.tools.bench.compare import AIMS, Report, Say, aim_of, busy, compare, missed, operators, said, teller
from mdm.tools.options import json_option, print_json

STEPS = 2  # of a run of the runtime's form, whose turn it is after that
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> a preset of the reference and what differs from it
    "dim-large": ("dim-large", {}),
    # The autoencoder has no part in a step: a small one is exported faster.
    "mdm-1024": ("mdm-49x2048", {"width": 1024, "vae_width": 64, "vocabulary": 100}),
}


@click.command("step")
@click.option(
    "--preset", "presets", type=click.Choice([*PRESETS]), multiple=True, default=tuple(PRESETS), show_default=True
)
@click.option("--tokens", type=int, multiple=True, default=(256, 1024), show_default=True, help="Of the picture.")
@click.option("--blocks", type=int, help="An odd number. Default: the preset's, 49.")
@click.option("--threads", type=int, help="Threads of the CPU. Default: one a core.")
@click.option("--seconds", type=float, default=20.0, show_default=True, help="Least time spent on the bundle's steps.")
@click.option("--no-compile", is_flag=True, help="Leave out torch.compile, which can take many minutes.")
@json_option
def command(
    presets: tuple[str, ...],
    tokens: tuple[int, ...],
    blocks: int | None,
    threads: int | None,
    seconds: float,
    no_compile: bool,
    as_json: bool,
) -> None:
    """Time a guided step of models with random weights: ONNX Runtime, its products alone, PyTorch."""
    say = teller(as_json)

    def measured() -> Iterator[Report]:
        for preset, count in itertools.product(presets, tokens):
            yield measure(preset, count, blocks, threads, seconds, not no_compile, say)
            gc.collect()  # sessions lie in cycles, and the next model needs their memory

    if as_json:
        print_json({"rows": [*measured()], "aims": {name: aim for name, (_, aim) in AIMS.items()}})
        return
    for line in table(measured()):
        click.echo(line)


def measure(
    preset: str, tokens: int, blocks: int | None, threads: int | None, seconds: float, compiles: bool, say: Say
) -> Report:
    say(f"{preset}, {tokens} tokens: export random weights")
    with tempfile.TemporaryDirectory() as folder:
        bundle = random_bundle(Path(folder), preset, tokens, blocks)
        deployed = Deployed(bundle, "class_to_image", STEPS, 1, threads=threads)
        say("warm up")
        deployed.turn()
        report = compare(deployed, seconds, compiles, say)
    return {"preset": preset, "tokens": tokens, "blocks": deployed.model.manifest["config"]["blocks"]} | report


def random_bundle(folder: Path, preset: str, tokens: int, blocks: int | None) -> Path:
    """A bundle of the preset whose pictures have that many tokens, exported from random weights."""
    from safetensors.torch import save_file

    from mdm.export import export_bundle
    from mdm.reference import PRESETS as REFERENCE
    from mdm.reference import build_model, load_config
    from mdm.tools.bench.export import write_tokenizer

    side = math.isqrt(max(tokens, 0))
    if side == 0 or side**2 != tokens:
        raise InputError(f"--tokens is {tokens}, expected a square number: pictures are square")
    base, changes = PRESETS[preset]
    fields = REFERENCE[base] | changes | ({} if blocks is None else {"blocks": blocks})
    config = load_config(fields)
    config = load_config(fields | {"image_size": side * config.patch})
    checkpoint, tokenizer = folder / "model.safetensors", folder / "tokenizer.model"
    save_file(build_model(config).state_dict(), checkpoint)
    if config.vocabulary:
        write_tokenizer(tokenizer, config.vocabulary)
    return export_bundle(
        checkpoint, config, folder / "out.bundle", tokenizer=tokenizer if config.vocabulary else None, validate=False
    )


def table(rows: Iterable[Report]) -> Iterator[str]:
    """Markdown: a line a model as soon as it is measured, then where the time goes in those that miss an aim."""
    shown = {
        "runtime_over_products": "of its products", "torch_over_runtime": "PyTorch eager takes",
        "compiled_over_runtime": "compiled takes", "python_over_runtime": "Python",
    }  # fmt: skip
    head = ["model", "tokens", "seconds a step", "products alone", *shown.values()]
    yield " | ".join(head)
    yield " | ".join("---" for _ in head)
    misses = []
    for row in rows:
        model = f"{row['preset']}, {row['blocks']} blocks"
        seconds = [f"{row['seconds'][name]['p50']:.4g}" for name in ("runtime", "products")]
        ratios = [said(name, row["ratios"][name]) if name in row["ratios"] else "-" for name in shown]
        yield " | ".join([model, str(row["tokens"]), *seconds, *ratios])
        if warning := busy(row):
            misses.append(f"{row['preset']}, {row['tokens']} tokens: {warning}")
        if names := missed(row["ratios"]):
            words = ", ".join(name.replace("_", " ") for name in names)
            misses.append(f"{row['preset']}, {row['tokens']} tokens misses the aim for {words}: {operators(row)}")
    yield " | ".join(["aim", "", "", "", *map(aim_of, shown)])
    yield ""
    yield from misses
