"""`mdm evaluate`: what share of held-out requests a checkpoint gets right, by detectors that know nothing of it."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from mdm.tools.options import FILE, json_option, print_json, progress_bar


@click.command("evaluate")
@click.argument("checkpoint", type=FILE, required=False)
@click.option("--preset", default="mdm-tiny", show_default=True, help="A preset's name, or a JSON file with a config.")
@click.option("--tokenizer", type=FILE, help="SentencePiece model. Default: the shipped one.")
@click.option("--count", default=200, show_default=True, type=click.IntRange(1), help="Requests a task.")
@click.option("--steps", type=click.IntRange(1), help="Sampler steps. Default: the preset's.")
@click.option("--guidance", type=click.FloatRange(0), help="Guidance scale. Default: the preset's.")
@click.option("--solver", help="Solver. Default: the preset's.")
@click.option("--seed", default=0, show_default=True)
@json_option
def command(
    checkpoint: Path | None,
    preset: str,
    tokenizer: Path | None,
    count: int,
    steps: int | None,
    guidance: float | None,
    solver: str | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure a checkpoint (default: the shipped one) on the picture world's held-out scenes."""
    from mdm.plugins.errors import InputError
    from mdm.reference import SHIPPED_CHECKPOINT, SHIPPED_TOKENIZER, Tokenizer, load_model
    from mdm.reference.multimodal import MDM
    from mdm.reference.world.measure import measure

    model = load_model(checkpoint or SHIPPED_CHECKPOINT, preset)
    if not isinstance(model, MDM):
        raise InputError(f"preset '{preset}' is of family 'dim', which has no text\nexpected one of family 'mdm'")
    overrides = {"steps": steps, "guidance": guidance, "solver": solver}
    settings = {name: value for name, value in overrides.items() if value is not None}
    with progress_bar(as_json) as bar:
        rows: dict[str, object] = {}

        def report(task: str, done: int, of: int) -> None:
            if task not in rows:
                rows[task] = bar.add_task(task, total=of, note="")
            bar.update(rows[task], completed=done)  # type: ignore[arg-type]

        figures = measure(model, Tokenizer(tokenizer or SHIPPED_TOKENIZER), count, seed, report, **settings)
    if as_json:
        print_json({"count": count, "figures": {figure.name: figure.value for figure in figures}})
        return
    table = Table("measured on held-out scenes", "right", "aim", title=f"{count} requests a task")
    for figure in figures:
        table.add_row(figure.name, f"{figure.value:.1%}", f"{figure.aim:.0%}" if figure.aim else "")
    Console().print(table)
