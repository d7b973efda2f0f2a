"""One stretch of a graph, in a folder: the smallest model that shows an error, its inputs, and the true outputs.

    model.onnx         the nodes, with their weights      (weights.bin beside it, where those are large)
    case.safetensors   in.<name>, out.<name>: floats of the truth in float64; how far off each may be, as metadata

Running it again needs ONNX Runtime and numpy, neither torch nor the bundle.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.runtime.backends import BACKENDS, TENSORRT
from mdm.runtime.ort import PROVIDERS, engine_errors, require_engine, session_options
from mdm.runtime.rtx import PROVIDER as RTX_PROVIDER
from mdm.runtime.rtx import use_rtx
from mdm.runtime.safetensors_header import read_array, read_header
from mdm.tools.check.finding import Array, Difference, Limits, difference
from mdm.tools.check.nodes.sessions import BuiltSession

MODEL, CASE, README, WEIGHTS = "model.onnx", "case.safetensors", "README.txt", "weights.bin"
ABOUT = "mdm.case"  # key of the metadata
EQUAL = Limits(1e-30, 1e-30, "equal")  # of whole numbers and decisions


def compare(found: Array, truth: Array) -> Difference:
    """Of what the truth says: where it is not finite itself, nothing is asked."""
    asked = np.isfinite(truth)
    if asked.all() or found.shape != truth.shape:
        return difference(found, truth)
    return difference(np.where(asked, found, 0), np.where(asked, truth, 0))


def about(limits: dict[str, Limits], looped: bool) -> dict[str, str]:
    """The metadata of a case; `looped`: it has a scan that a GPU too does better by our library than token by token."""
    return {ABOUT: json.dumps({"limits": {name: asdict(one) for name, one in limits.items()}, "looped": looped})}


def replay(folder: Path, backend_name: str = "ort-cpu") -> tuple[Difference, Limits]:
    """Run it again -> the output that takes most of its limit, and that limit."""
    header = read_header(folder / CASE)
    if ABOUT not in header.metadata or not (folder / MODEL).is_file():
        raise InputError(f"'{folder}' is no folder of mdm check: {MODEL} or the limits in {CASE} are missing")
    limits, looped = limits_in(header.metadata[ABOUT], folder)
    arrays = {name: read_array(folder / CASE, entry) for name, entry in header.tensors.items()}
    feeds = {name.removeprefix("in."): array for name, array in arrays.items() if name.startswith("in.")}
    if missing := [name for name in limits if f"out.{name}" not in arrays]:
        raise InputError(f"'{folder / CASE}' has limits for {', '.join(missing)}, and no true values")
    found = dict(zip(limits, run(folder, backend_name, feeds, list(limits), looped), strict=True))
    errors = {}
    for name, array in found.items():
        truth = arrays[f"out.{name}"]
        if array.shape != truth.shape:
            raise InputError(f"output '{name}' has the shape {list(array.shape)}, the truth has {list(truth.shape)}")
        errors[name] = compare(array, truth)
    worst = max(errors, key=lambda name: limits[name].used(errors[name]))
    return errors[worst], limits[worst]


def limits_in(text: str, folder: Path) -> tuple[dict[str, Limits], bool]:
    try:
        told: dict[str, Any] = json.loads(text)
        limits = {name: Limits(**one) for name, one in told["limits"].items()}
        sound = limits and all(0 < limit < np.inf for one in limits.values() for limit in (one.rms, one.worst))
        looped = bool(told["looped"])
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f"the limits in '{folder / CASE}' are not those that mdm check writes")
    return limits, looped


def run(folder: Path, backend_name: str, feeds: dict[str, Array], wanted: list[str], looped: bool) -> list[Array]:
    if backend_name not in BACKENDS:
        raise InputError(f"unknown backend '{backend_name}'\nbackends: {', '.join(BACKENDS)}")
    if backend_name == TENSORRT:
        from mdm.runtime.tensorrt.library import Library

        return BuiltSession(Library(), (folder / MODEL).read_bytes(), str(folder), folder).run(wanted, feeds)
    require_engine()
    import onnxruntime

    provider, device = PROVIDERS[backend_name]
    by_rtx = provider == RTX_PROVIDER
    options = session_options(folder, native=device == "cpu" or (looped and not by_rtx))
    if by_rtx:
        use_rtx(options, 0, {name: (array.shape, array.shape, array.shape) for name, array in feeds.items()})
    elif provider not in onnxruntime.get_available_providers():
        raise EnvironmentLackError(f"backend '{backend_name}' needs ONNX Runtime's {provider}, which is not here")
    with engine_errors(f"the model in '{folder}'"):
        providers = None if by_rtx else [provider]
        session = onnxruntime.InferenceSession((folder / MODEL).read_bytes(), options, providers)
        if provider not in session.get_providers():  # the CPU would be judged in its place
            raise EnvironmentLackError(f"ONNX Runtime cannot load its {provider}\nmdm doctor says why")
        found: list[Array] = session.run(wanted, feeds)
    return found
