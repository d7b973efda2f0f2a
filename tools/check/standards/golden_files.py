"""Whether a golden file holds what its graph, or its task, asks for. It is a stranger's, like all of a bundle.

Sizes that a graph leaves open go by name: "batch" is one number wherever it stands in a file.

Letters: S evaluations, L latent tokens, T text tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mdm.runtime.model import Model, makes
from mdm.runtime.solver import STOCHASTIC
from mdm.tools.check.finding import Array

CARRIED = ("base", "point", "history", "mask", "x0_before", "row", "noise")  # inputs that a run makes on its way
KINDS = {"f": "floats", "i": "whole numbers", "b": "true or false"}

Shape = Sequence[int | str]


def fault_of_case(arrays: Mapping[str, Array], described: Mapping[str, Any]) -> str:
    """What is wrong with the inputs and answers of a graph, or nothing."""
    wanted = {
        f"{prefix}{spec['name']}": (spec["shape"], np.dtype(spec["dtype"]))
        for prefix, kind in (("in.", "inputs"), ("out.", "outputs"))
        for spec in described[kind]
    }
    sizes: dict[str, int] = {}
    for name in arrays.keys() - wanted.keys():
        return f"it has '{name}', which the graph has not"
    for name, (shape, dtype) in wanted.items():
        exact = dtype if name.startswith("in.") else None
        if fault := fault_of(arrays, name, shape, dtype.kind, sizes, exact):
            return fault
    return ""


def fault_of_run(arrays: Mapping[str, Array], model: Model, task: str) -> str:
    """What is wrong with a task's whole run, or nothing."""
    sizes: dict[str, int] = {}
    for name, shape, kind, exact in wanted_of_run(model, task):
        if fault := fault_of(arrays, name, shape, kind, sizes, exact):
            return fault
    steps, evaluations = int(arrays["in.steps"][0]), sizes["S"]
    if not 1 <= steps <= evaluations:
        return f"in.steps is {steps}, expected 1 to {evaluations}: it has so many evaluations"
    described, text = model.bundle.graph(model.task(task)["step"]), model.text
    if "ids" in {name.removeprefix("out.") for name in arrays}:
        ids = arrays["out.ids"]
        tokens = arrays["in.base"].shape[1] - picture_tokens(model, described)
        if not text or ids.shape[1] != tokens:
            return f"out.ids has {ids.shape[1]} tokens, expected {tokens if text else 0}"
        if ids.size and not (ids.min() >= 0 and ids.max() < text["vocabulary"]):
            return f"out.ids has pieces of {ids.min()} to {ids.max()}, expected 0 to {text['vocabulary'] - 1}"
    return ""


def wanted_of_run(model: Model, task: str) -> Iterator[tuple[str, Shape, str, np.dtype[Any] | None]]:
    """name, shape, kind, and the type where it has to be that one"""
    told, graph = model.task(task), model.bundle.graph(model.task(task)["step"])
    inputs = {spec["name"]: spec for spec in graph["inputs"]}
    latents = inputs["base"]["shape"]
    for name, spec in inputs.items():
        if name == "base" or name not in CARRIED:
            yield f"in.{name}", spec["shape"], np.dtype(spec["dtype"]).kind, np.dtype(spec["dtype"])
    yield "in.steps", [1], "i", None
    yield from (("out.eps", ["S", *latents], "f", None), ("out.points", ["S", *latents], "f", None))
    yield "out.z", latents, "f", None
    if "mask" in inputs:
        yield "out.mask", ["S", *inputs["mask"]["shape"]], "f", None
    sampler = model.manifest["sampler_for"].get(task, model.manifest["sampler"])
    if sampler["solver"] in STOCHASTIC:
        yield "in.noise", ["S", *latents], "f", None
    if makes(told["text"]):
        yield "out.ids", ["batch", "T"], "i", None
        yield "out.margin", ["batch", "T"], "f", None
    if makes(told["image"]) and model.half("decode", graph["image_size"]) in model.manifest["graphs"]:
        side = graph["image_size"] * model.picture["factor"]
        yield "out.picture", ["batch", model.picture["channels"], side, side], "f", None


def picture_tokens(model: Model, described: Mapping[str, Any]) -> int:
    """Of all its pictures."""
    if not described["pictures"]:
        return 0
    return int(described["pictures"] * (described["image_size"] // model.picture["patch"]) ** 2)


def fault_of(
    arrays: Mapping[str, Array], name: str, shape: Shape, kind: str, sizes: dict[str, int],
    exact: np.dtype[Any] | None = None,
) -> str:  # fmt: skip
    """Of one tensor; names in `shape` that are new are added to `sizes`."""
    array = arrays.get(name)
    if array is None:
        return f"it lacks '{name}'"
    if array.dtype.kind != kind or exact not in (None, array.dtype):
        return f"{name} is {array.dtype}, expected {KINDS[kind] if exact is None else exact}"
    known = [sizes.get(size, size) if isinstance(size, str) else size for size in shape]
    fits = len(known) == array.ndim and all(
        isinstance(a, str) or a == b for a, b in zip(known, array.shape, strict=True)
    )
    if not fits or not array.size:
        return f"{name} has the shape {list(array.shape)}, expected [{', '.join(map(str, known))}]"
    sizes |= {size: found for size, found in zip(shape, array.shape, strict=True) if isinstance(size, str)}
    if kind == "f" and not np.isfinite(array).all():
        return f"{name} has values that are not finite"
    return ""
