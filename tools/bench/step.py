"""A step in all its forms, in one run: the project's claim of speed, with or without a checkpoint.

A step is one evaluation of the network with guidance, and the solver's arithmetic. Its forms take turns:

    runtime     a bundle's step graph as the pipelines run it: one tick of the scheduler
    products    the graph's matrix products and nothing else (`products.py`)
    torch       the reference in float32, eager, with random weights: time does not depend on values
    compiled    the same under torch.compile

`mdm bench step` exports models with random weights and compares; `mdm bench BUNDLE` compares for a bundle.
"""

from __future__ import annotations

import gc
import itertools
import math
import operator
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from mdm.plugins.errors import InputError
from mdm.runtime.model import Prepared
from mdm.tools.bench.clock import Form, percentiles, take_turns, timed
from mdm.tools.bench.products import OPERATORS, products_of, products_session, profile, shares, threads_of
from mdm.tools.options import json_option, print_json

if TYPE_CHECKING:
    from mdm.tools.bench.bundle import Deployed, Run

Report = dict[str, Any]
Say = Callable[[str], None]  # what is being done

STEPS = 2  # of a run of the runtime's form, whose turn it is after that
NAMES = {
    "runtime": "ONNX Runtime", "products": "products alone", "torch": "PyTorch, eager", "compiled": "PyTorch, compiled"
}  # fmt: skip
# What the project claims: a ratio of medians is at most (le) or at least (ge) that.
AIMS: dict[str, tuple[Callable[[float, float], bool], float]] = {
    "runtime_over_products": (operator.le, 1.3),
    "torch_over_runtime": (operator.ge, 1.6),
    "compiled_over_runtime": (operator.ge, 1.0),
    "python_over_runtime": (operator.le, 0.01),
}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> a preset of the reference and what differs from it
    "dim-large": ("dim-large", {}),
    # The autoencoder has no part in a step: a small one is exported faster.
    "mdm-1024": ("mdm-49x2048", {"width": 1024, "vae_width": 64, "vocabulary": 100}),
}


# ------------------------------------------------------------------------------------------------------ the reference


def torch_step(network: Any, task: Mapping[str, Any], prepared: Sequence[Prepared]) -> Callable[[], object]:
    """The reference's step for the same batch: both halves of guidance in one evaluation, then DDIM."""
    import torch

    from mdm.reference.generate import Estimator, schedule_of
    from mdm.reference.guidance import guide
    from mdm.reference.schedule import make_schedule
    from mdm.reference.solvers import ddim
    from mdm.reference.tasks import Request, Task

    def stacked(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([one.job.inputs[name] for one in prepared]))

    z = torch.from_numpy(np.stack([one.job.state["base"] for one in prepared]))
    guidance: float = prepared[0].sampler["guidance"]
    estimate: Any
    if network.config.family == "mdm":
        parts = {name: task[name] for name in ("text", "image", "drops")}
        rest = [stacked(name) for name in ("given", "y", "uncond", "uncond_y")]
        request = Request(Task(**parts), prepared[0].shape.text, z, *rest)
        schedule = schedule_of(network, request)
        estimate = Estimator(network, request, schedule, guidance)
    else:
        schedule = make_schedule(network.config.schedule_image)
        y, null = stacked("y"), stacked("uncond_y")

        def estimate(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            times = schedule.model_time(t).expand(len(z))
            if not guidance:
                return network(z, times, y)
            told, untold = network(torch.cat([z, z]), times.repeat(2), torch.cat([y, null])).chunk(2)
            return guide(told, untold, guidance)

    times = torch.tensor([0.9, 0.8], dtype=torch.float64)
    return torch.no_grad()(partial(ddim, estimate, z, schedule, times))


# --------------------------------------------------------------------------------------------------- the comparison


def compare(deployed: Deployed, seconds: float, compiles: bool, say: Say) -> Report:
    """Time all forms in turns, for `seconds` of the runtime's. The bundle has run before: it is warm."""
    say("profile the step")
    backend = deployed.backend
    profiled = profile(backend.bundle, backend.name, backend.threads, deployed.requests)
    threads, spent = threads_of(profiled), shares(profiled)
    forms: dict[str, Form] = {"runtime": deployed.turn}
    missing: dict[str, str] = {}
    compiling = None
    prepared = [deployed.model.prepare(request) for request in deployed.requests]
    if reason := lacking("onnx"):
        missing["products"] = reason
    else:
        say("warm up the products")
        session, feeds = products_session(products_of(profiled[0]), backend, prepared[0].job.graphs[0])
        forms["products"] = timed(partial(session.run, None, feeds))
        forms["products"]()
    if reason := lacking("torch") or ("" if backend.device == "cpu" else "the reference is timed on the CPU alone"):
        missing |= {"torch": reason, "compiled": reason}
    else:
        say("make the PyTorch model")
        network = reference_network(deployed.model.manifest, threads)
        step = partial(torch_step, task=deployed.model.task(deployed.task), prepared=prepared)
        forms["torch"] = timed(step(network))
        if compiles:
            say("compile, which can take minutes")
            compiled = timed(step(compiled_network(network)))
            try:
                [compiling] = compiled()
                forms["compiled"] = compiled
            except RuntimeError as error:  # torch's own classes descend from it: no C++ compiler is the usual reason
                missing["compiled"] = f"torch.compile failed: {' '.join(str(error).split())[:200]}"
        else:
            missing["compiled"] = "left out by --no-compile"
    say(f"time {', '.join(forms)}")
    deployed.runs.clear()
    times = take_turns(forms, seconds)
    return {
        "threads": threads,
        "seconds": {name: percentiles(took) | {"least": min(took), "count": len(took)} for name, took in times.items()},
        "ratios": ratios_of(times, deployed.runs),
        "operators": spent,
        "product_share": sum(spent.get(name, 0) for name in OPERATORS),
        "compile_seconds": compiling,
        "missing": missing,
    }


def teller(as_json: bool) -> Say:
    """Tells a person on stderr what is being done. No spinner: it would take time from what is timed."""
    return lambda what: None if as_json else click.echo(what, err=True)


def lacking(module: str) -> str:
    """Why what needs the module is not measured; nothing where it is there."""
    try:
        import_module(module)
    except ImportError:
        return f'the Python module {module} is not installed: pip install "mdm-deploy[export]"'
    return ""


def reference_network(manifest: Mapping[str, Any], threads: int) -> Any:
    import torch

    from mdm.reference import build_model, load_config

    torch.set_num_threads(threads)
    return build_model(load_config(manifest["config"])).eval().requires_grad_(False)


def compiled_network(network: Any) -> Any:
    import torch

    return torch.compile(network, dynamic=False)


def ratios_of(times: Mapping[str, Sequence[float]], runs: Sequence[Run]) -> dict[str, float]:
    """Ratios of medians, of the forms that were measured; and the share of a step that is not the engine's."""
    medians = {name: statistics.median(took) for name, took in times.items()}
    found = {}
    for name in AIMS:
        over, _, under = name.partition("_over_")
        if over in medians and under in medians:
            found[name] = medians[over] / medians[under]
    ticking = sum(sum(run.steps) for run in runs)
    return found | {"python_over_runtime": 1 - sum(run.engine for run in runs) / ticking}


def missed(ratios: Mapping[str, float]) -> list[str]:
    """The aims that were measured and are not reached."""
    return [name for name, (holds, aim) in AIMS.items() if name in ratios and not holds(ratios[name], aim)]


# ------------------------------------------------------------------------------------------------------- the command


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
    from mdm.tools.bench.bundle import Deployed  # whose command uses this module

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
        if names := missed(row["ratios"]):
            words = ", ".join(name.replace("_", " ") for name in names)
            misses.append(f"{row['preset']}, {row['tokens']} tokens misses the aim for {words}: {operators(row)}")
    yield " | ".join(["aim", "", "", "", *map(aim_of, shown)])
    yield ""
    yield from misses


def said(name: str, ratio: float) -> str:
    return f"{ratio:.2%}" if name == "python_over_runtime" else f"{ratio:.2f}"


def aim_of(name: str) -> str:
    holds, aim = AIMS[name]
    return f"{'at most' if holds is operator.le else 'at least'} {said(name, aim)}"


def operators(report: Report) -> str:
    """Where the engine's time goes."""
    return ", ".join(f"{name} {share:.1%}" for name, share in [*report["operators"].items()][:8])
