"""The commands that run a bundle: `mdm generate`, `caption`, `ask`, `complete`, `joint` and `turn`.

What they share stands in `sampling_options`; a sampler's settings have the names they have in Python and JSON.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click

from mdm.plugins.errors import InputError
from mdm.runtime import load
from mdm.runtime.model import makes
from mdm.runtime.request import KIND_OF_SETTING
from mdm.runtime.schedule import SPACINGS
from mdm.runtime.solver import SOLVERS
from mdm.tools.options import FILE, F, engine_options, json_option, print_json, progress_bar
from mdm.tools.preview import Watcher
from mdm.tools.requests_file import Asked, read_requests
from mdm.tools.result_files import files_for
from mdm.tools.run_requests import Outcome, run_requests

HELP = {
    "solver": f"Default: the model's own. One of {', '.join(SOLVERS)}.",
    "steps": "Steps of the solver; more are slower and better.",
    "guidance": "How much more the request counts; 0 is none.",
    "spacing": f"Of the steps in time: {', '.join(SPACINGS)}.",
    "t_start": "Time at which sampling begins; noise is 1.",
    "t_end": "Time at which it ends; a clean sample is 0.",
    "final_zero": "Whether the last step goes to time 0.",
}


def solvers_with(option: str) -> list[str]:
    return [name for name, solver in SOLVERS.items() if option in solver.options]


bundle_argument = click.argument("bundle", type=FILE)
negative_option = click.option("--negative", help="What the picture should not show. Default: nothing in particular.")
filmstrip_option = click.option("--filmstrip", is_flag=True, help="Write how each picture came out of the noise, too.")


def sampling_options(command: F) -> F:
    """Everything that all of these commands take."""
    command = json_option(command)
    for option in (
        click.option(
            "--preview", type=click.IntRange(1), metavar="N", help="Show or write a draft every N evaluations."
        ),
        click.option(
            "--out", type=FILE, help="A folder, or x.png for a single picture. Default: out; text is only printed."
        ),
        click.option(
            "--from", "source", type=FILE, help="Requests: .txt or .jsonl with one a line, or a .png made by mdm."
        ),
    ):
        command = option(command)
    command = engine_options(command)
    for name, kind in reversed(KIND_OF_SETTING.items()):
        word = name.replace("_", "-")
        flag = f"--{word}/--no-{word}" if kind is bool else f"--{word}"
        command = click.option(
            flag, name, type=kind, default=None, help=HELP.get(name) or f"For {', '.join(solvers_with(name))}."
        )(command)
    for option in (
        click.option("--size", type=int, help="Side of the picture in pixels, if the bundle has several."),
        click.option("--batch", type=click.IntRange(1), default=1, help="Samples of each request. Default: 1."),
        click.option("--sample", type=int, help="Which of the seed's samples is the first. Default: 0."),
        click.option("--seed", type=int, help="The same seed gives the same result. Default: 0."),
    ):
        command = option(command)
    return command


@click.command("generate")
@bundle_argument
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option("--label", "labels", type=int, multiple=True, help="A class; may be given several times.")
@negative_option
@click.option("--upsample", type=int, help="Upsample guidance by this factor (DiM).")
@filmstrip_option
@sampling_options
def generate(bundle: Path, prompts: tuple[str, ...], labels: tuple[int, ...], **options: Any) -> None:
    """Make pictures from prompts or classes."""
    expect_arguments("generate", "PROMPT, or --label N", prompts or labels, options)
    typed = [{"prompt": prompt, "label": label} for prompt, label in product(prompts or [None], labels or [None])]
    run("generate", ("text_to_image", "class_to_image"), bundle, typed, "prompt", **options)


@click.command("caption")
@bundle_argument
@click.argument("pictures", metavar="PICTURE...", nargs=-1)
@sampling_options
def caption(bundle: Path, pictures: tuple[str, ...], **options: Any) -> None:
    """Say what pictures show."""
    expect_arguments("caption", "PICTURE...", pictures, options)
    run("caption", ("caption",), bundle, [{"picture": one} for one in pictures] or [{}], "picture", **options)


@click.command("ask")
@bundle_argument
@click.argument("picture", required=False)
@click.argument("prompt", required=False)
@sampling_options
def ask(bundle: Path, picture: str | None, prompt: str | None, **options: Any) -> None:
    """Answer a question about a picture."""
    expect_arguments("ask", "PICTURE PROMPT", picture and prompt, options)
    run("ask", ("ask",), bundle, [{"picture": picture, "prompt": prompt}], "prompt", **options)


@click.command("complete")
@bundle_argument
@click.argument("prompts", metavar="PROMPT...", nargs=-1)
@sampling_options
def complete(bundle: Path, prompts: tuple[str, ...], **options: Any) -> None:
    """Go on from texts."""
    expect_arguments("complete", "PROMPT...", prompts, options)
    run("complete", ("complete",), bundle, [{"prompt": one} for one in prompts] or [{}], "prompt", **options)


@click.command("joint")
@bundle_argument
@click.option("--label", type=int, help="A class.")
@filmstrip_option
@sampling_options
def joint(bundle: Path, label: int | None, **options: Any) -> None:
    """Make pictures together with texts that describe them."""
    run("joint", ("joint",), bundle, [{"label": label}], "prompt", **options)


@click.command("turn")
@bundle_argument
@click.argument("picture", required=False)
@click.argument("prompt", required=False)
@negative_option
@filmstrip_option
@sampling_options
def turn(bundle: Path, picture: str | None, prompt: str | None, **options: Any) -> None:
    """Go on in a dialogue: from a picture and a request to a new picture and a text."""
    expect_arguments("turn", "PICTURE PROMPT", picture and prompt, options)
    run("turn", ("turn",), bundle, [{"picture": picture, "prompt": prompt}], "prompt", **options)


def expect_arguments(verb: str, what: str, there: object, options: dict[str, Any]) -> None:
    if not there and not options["source"]:
        raise InputError(f"nothing says what to {verb}\nexpected: mdm {verb} BUNDLE {what}, or --from FILE")


def run(
    verb: str,
    tasks: Sequence[str],
    bundle: Path,
    typed: list[dict[str, Any]],
    line_is: str,
    *,
    source: Path | None,
    batch: int,
    backend: str,
    threads: int | None,
    memory: int | None,
    profile: str | None,
    out: Path | None,
    preview: int | None,
    as_json: bool,
    filmstrip: bool = False,
    **options: Any,
) -> None:
    """`typed`: what stood on the command line, fields for each request; `options`: fields for all of them."""
    begun = time.monotonic()
    given = [{name: value for name, value in (options | one).items() if value is not None} for one in typed]
    asked = [with_task(one, verb, tasks) for one in requests_asked(source, given, line_is)]
    requests = [(one, one.request()) for one in asked]
    pipeline = load(bundle, backend, threads=threads, memory=memory, profile=profile)
    manifest = pipeline.model.manifest
    pictures = any(makes(pipeline.model.task(request.task)["image"]) for _, request in requests)
    count = len(requests) * batch
    files = files_for(out, count, pictures)
    made_by = {one.checkpoint for one in asked} - {None, manifest["provenance"]["checkpoint"]["sha256"]}
    if made_by:
        click.echo(f"{source} was made by another checkpoint than this bundle's: the result will differ", err=True)

    records: list[dict[str, Any]] = []
    undecoded = False
    with progress_bar(as_json, transient=True) as bar:
        watcher = Watcher(pipeline.model, bar, verb, count, files, preview, filmstrip)
        for outcomes in run_requests(pipeline, requests, batch, files, watcher):
            undecoded |= any(one.path is not None and one.path.suffix == ".npy" for one in outcomes)
            if as_json:
                records += [in_json(one) for one in outcomes if one.record is not None]
                continue
            bar.stop()  # while it runs it takes what is printed for its own
            for one in outcomes:
                click.echo(one.said if one.path is None else f"{one.path}  {one.said}".rstrip())
            bar.start()
    if undecoded:
        click.echo(
            "There are latents, but no pictures: this bundle has no autoencoder for them.\n"
            "Export it with --autoencoder FILE.",
            err=True,
        )
    if as_json:
        print_json({"results": records, "seconds": round(time.monotonic() - begun, 3)})


def requests_asked(source: Path | None, given: list[dict[str, Any]], line_is: str) -> list[Asked]:
    if source is None:
        return [Asked(one) for one in given]
    if len(given) > 1:
        raise InputError(f"--from '{source}' brings the requests, but {len(given)} more are given: leave them out")
    return read_requests(source, line_is, given[0])


def with_task(one: Asked, verb: str, tasks: Sequence[str]) -> Asked:
    """With the command's task for it: of two the first if there is a prompt."""
    task = one.fields.get("task", tasks[0] if "prompt" in one.fields else tasks[-1])
    if task not in tasks:
        with one.blamed():
            raise InputError(f"task is {task!r}, but mdm {verb} runs {' and '.join(tasks)}")
    return Asked(one.fields | {"task": task}, one.where, one.checkpoint)


def in_json(one: Outcome) -> dict[str, Any]:
    """A record with its file as seen from here."""
    assert one.record is not None
    return one.record if one.path is None else one.record | {"file": str(one.path)}
