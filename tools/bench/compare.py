"""A step in all its forms, in one run.

A step is one evaluation of the network with guidance, and the solver's arithmetic. Its forms take turns:

    runtime     a bundle's step graph as the pipelines run it
    products    the graph's matrix products and nothing else (`products.py`)
    torch       the reference in float32, eager, with random weights: time does not depend on values
    compiled    the same under torch.compile
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from mdm.runtime.model import Prepared
from mdm.runtime.ort import OrtBackend
from mdm.tools.bench.clock import Form, percentiles, take_turns, timed
from mdm.tools.bench.products import OPERATORS, products_of, products_session, profile, shares, threads_of

if TYPE_CHECKING:
    from mdm.tools.bench.bundle import Deployed, Run

Report = dict[str, Any]
Say = Callable[[str], None]  # what is being done

DISTURBED = 1.5  # a median so many times the least time tells of the machine, not of the form
NAMES = {"products": "products alone", "torch": "PyTorch, eager", "compiled": "PyTorch, compiled"}
# What the project claims: a ratio of medians is at most (le) or at least (ge) that.
AIMS: dict[str, tuple[Callable[[float, float], bool], float]] = {
    "runtime_over_products": (operator.le, 1.3),
    "torch_over_runtime": (operator.ge, 1.6),
    "compiled_over_runtime": (operator.ge, 1.0),
    "python_over_runtime": (operator.le, 0.01),
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
    backend = deployed.backend.backend
    forms: dict[str, Form] = {"runtime": deployed.turn}
    missing: dict[str, str] = {}
    threads, spent, compiling = None, {}, None
    prepared = [deployed.model.prepare(request) for request in deployed.requests]
    if not isinstance(backend, OrtBackend) or backend.plugin:
        missing["products"] = "only ONNX Runtime itself says which products a step has"
    else:
        say("profile the step")
        profiled = profile(backend, deployed.requests)
        threads, spent = threads_of(profiled), shares(profiled)
        if reason := lacking("onnx"):
            missing["products"] = reason
        else:
            say("warm up the products")
            session, feeds = products_session(products_of(profiled[0]), backend, prepared[0].job.graphs[0])
            forms["products"] = timed(partial(session.run, None, feeds))
            forms["products"]()
    if threads is None or backend.name != "ort-cpu":
        missing |= dict.fromkeys(("torch", "compiled"), "the reference is timed on the CPU alone")
    elif reason := lacking("torch"):
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
        "engine": "ONNX Runtime" if isinstance(backend, OrtBackend) else "TensorRT",
        "threads": threads,
        "seconds": {name: percentiles(took) | {"least": min(took), "count": len(took)} for name, took in times.items()},
        "ratios": ratios_of(times, deployed.runs),
        "operators": spent,
        "product_share": sum(spent.get(name, 0) for name in OPERATORS) if spent else None,
        "compile_seconds": compiling,
        "missing": missing,
    }


def names_in(report: Report) -> dict[str, str]:
    return {"runtime": report["engine"], **NAMES}


def busy(report: Report) -> str:
    """A warning where the machine had other things to do, or nothing."""
    forms = [name for name, took in report["seconds"].items() if took["p50"] > DISTURBED * took["least"]]
    said = ", ".join(names_in(report)[name] for name in forms)
    return (
        f"the machine was busy: medians far above the least times of {said}; do not trust these ratios" if forms else ""
    )


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


# ---------------------------------------------------------------------------------------------------------- in words


def said(name: str, ratio: float) -> str:
    return f"{ratio:.2%}" if name == "python_over_runtime" else f"{ratio:.2f}"


def aim_of(name: str) -> str:
    holds, aim = AIMS[name]
    return f"{'at most' if holds is operator.le else 'at least'} {said(name, aim)}"


def operators(report: Report) -> str:
    """Where the engine's time goes."""
    return ", ".join(f"{name} {share:.1%}" for name, share in [*report["operators"].items()][:8])
