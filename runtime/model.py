"""A bundle's model as requests see it: what a request is made of, and what comes out of its latents.

Text and picture latents of a sample stand in one tensor, the text's tokens first; a dialogue turn has the earlier
picture's before the new one's. Samples are encoded and decoded one by one, so none depends on its neighbours.

Letters: L latent tokens, T text tokens, M tokens of a picture, d latent width, C x H x W a picture, m modalities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mdm.plugins.errors import EngineError, InputError
from mdm.runtime.backend import Array, Backend
from mdm.runtime.bundle import Bundle, manifest_schema
from mdm.runtime.consistency import check_model
from mdm.runtime.json_schema import parse_json, told, validate
from mdm.runtime.lane import Job
from mdm.runtime.noise import START, check_key, normal
from mdm.runtime.pictures import fit, read_picture, to_numbers, to_pixels
from mdm.runtime.request import Request, sampler_for
from mdm.runtime.schedule import Schedule, make_schedule
from mdm.runtime.solver import ROW, solver_table
from mdm.runtime.tokenizer import Tokenizer
from mdm.runtime.words import nearest

MAX_TABLE = 64 * 2**20  # bytes of a sampler's file


@dataclass(frozen=True)
class Shape:
    """How a request's latents lie: T text tokens, then picture tokens; for DiM neither, but C x H x W."""

    latents: tuple[int, ...]  # [L,d] or [C,H,W]
    text: int  # T
    new: int  # picture tokens at the end that are generated or given last


@dataclass
class Prepared:
    """A request, checked and encoded."""

    request: Request
    sampler: dict[str, Any]
    shape: Shape
    job: Job


class Model:
    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend, self.manifest = bundle, backend, bundle.manifest
        self.picture, self.text = self.manifest["picture"], self.manifest["text"]
        check_model(self.manifest, f"bundle '{bundle.path}'")

    # ------------------------------------------------------------------------------------------------ what there is

    def task(self, name: str) -> dict[str, Any]:
        tasks: dict[str, dict[str, Any]] = self.manifest["tasks"]
        if name not in tasks:
            raise InputError(f"this model has no task {told(name)}{nearest(name, tasks)}\ntasks: {', '.join(tasks)}")
        return tasks[name]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        name = self.text["tokenizer"] if self.text else None
        if name is None:
            raise InputError(f"bundle '{self.bundle.path}' has no tokenizer: it takes and makes no text")
        model = self.bundle.content(name)
        return Tokenizer(model, self.text["vocabulary"], self.text["pad"])

    def graph_for(self, role: str, task: dict[str, Any], request: Request, guided: bool, upsample: int = 0) -> str:
        """The graph for a task's set of modalities at the size asked for."""
        modalities, pictures = modalities_of(task), pictures_of(task)
        asked = request.size
        sizes = []
        for name, graph in self.manifest["graphs"].items():
            fits = graph["modalities"] == modalities and graph["pictures"] == pictures
            if graph["role"] != role or not fits or graph["guided"] != guided or graph["upsample"] != upsample:
                continue
            pixels = graph["image_size"] * self.picture["factor"] if pictures else None
            if asked is None or asked == pixels:
                return str(name)
            sizes += [str(pixels)] * (pixels is not None)
        if upsample:
            raise InputError(
                f"this bundle has no graph with upsample guidance by {upsample}"
                f"{'' if asked is None else f' at {asked} pixels'}\nexport it with --upsample {upsample}"
            )
        raise InputError(
            f"size is {asked}, but this bundle's pictures are of {' or '.join(sizes) or 'no size'}\n"
            "other sizes come with mdm export --image-size"
        )

    def schedules(self, task: dict[str, Any]) -> tuple[list[Schedule], int]:
        """The schedules of a table's modalities, and which of them the time grid follows."""
        known = self.manifest["schedules"]
        modalities = modalities_of(task)
        clock = modalities.index("image") if makes(task["image"]) else 0
        return [make_schedule(known[modality]) for modality in modalities], clock

    def rows(self, task: str, sampler: dict[str, Any], upsample: int = 0) -> Array:
        """The table of a run, float64 [S,m,R]."""
        settings = {name: value for name, value in sampler.items() if name != "guidance"}
        schedules, clock = self.schedules(self.task(task))
        return solver_table(schedules, clock=clock, upsample={"factor": upsample} if upsample else None, **settings)

    # ---------------------------------------------------------------------------------------------- before the steps

    def prepare(self, request: Request) -> Prepared:
        task = self.task(request.task)
        self.check_fields(request, task)
        check_key(request.seed, request.sample)
        if makes(task["text"]):
            self.bundle.graph("decode_text")  # better told now than after all steps
        own: dict[str, Any] = self.manifest["sampler_for"].get(request.task, self.manifest["sampler"])
        m = request.upsample or 0
        if m:
            own = self.upsample_sampler(task, request, m)
        sampler = sampler_for(own, request.sampler)
        guided = bool(sampler["guidance"] and task["drops"])
        graph = self.graph_for("step", task, request, guided, m)
        rows = self.rows(request.task, sampler, m)
        graphs = [graph] * len(rows)
        if m:  # rows without a correction run on the plain graph
            size = self.bundle.graph(graph)["image_size"]
            plain = self.graph_for("step", task, replace(request, size=size * self.picture["factor"]), guided)
            graphs = [graph if row[0, ROW.index("w")] else plain for row in rows]
        shape, inputs = self.conditioning(request, task, graph)
        inputs["guidance"] = np.float32(sampler["guidance"])
        base = start_of(request, shape.latents)
        if "given" in inputs:
            base = np.where(inputs["given"][:, None], inputs.pop("clean"), base)
        tokens = shape.latents[0] if "given" in inputs else 0
        job = Job(graphs, rows.astype(np.float32), tokens, request.seed, request.sample, inputs, {"base": base})
        return Prepared(request, sampler, shape, job)

    def check_fields(self, request: Request, task: dict[str, Any]) -> None:
        """Everything the task needs is there, and nothing it has no use for."""
        needs = {"prompt": task["text"] in ("given", "both"), "picture": task["image"] in ("given", "both")}
        for name, needed in needs.items():
            if needed != (getattr(request, name) is not None):
                raise InputError(f"task '{request.task}' {'needs' if needed else 'takes no'} {name}")
        if request.negative is not None and task["drops"] != "text":
            raise InputError(f"task '{request.task}' takes no negative prompt")
        classes = self.manifest["null_class"]
        if request.label is not None and not 0 <= request.label < classes:
            found = f"expected 0 to {classes - 1}" if classes else "but this model has no classes"
            raise InputError(f"label is {told(request.label)}, {found}")

    def upsample_sampler(self, task: dict[str, Any], request: Request, factor: int) -> dict[str, Any]:
        """The sampler of a model's upsample guidance, from its table's file."""
        graph = self.graph_for("step", task, request, True, factor)
        name = f"sampler/{graph.removeprefix('step_')}.json"
        table = parse_json(self.bundle.content(name), name, MAX_TABLE)
        sampler: Any = table.get("sampler") if isinstance(table, dict) else None
        schema = manifest_schema()
        validate(sampler, {**schema["$defs"]["sampler"], "$defs": schema["$defs"]}, f"sampler of '{name}'")
        return dict(sampler)

    def conditioning(self, request: Request, task: dict[str, Any], graph: str) -> tuple[Shape, dict[str, Any]]:
        """What is told: class, clean latents and which tokens they are, and what the unguided half gets instead."""
        null = self.manifest["null_class"]
        y = null if request.label is None else request.label
        inputs: dict[str, Any] = {"y": np.int64(y), "uncond_y": np.int64(null if task["drops"] == "class" else y)}
        latents = {t["name"]: t["shape"] for t in self.bundle.graph(graph)["inputs"]}["base"][1:]
        if self.text is None:
            return Shape(tuple(latents), 0, 0), inputs
        clean, given, uncond = [], [], []
        length = 0
        if task["text"]:
            ids = self.tokenizer.encode(request.prompt or "")
            refused = self.tokenizer.encode(request.negative or "") if task["drops"] == "text" else ids
            length = self.text_length(max(len(ids), len(refused)), makes(task["text"]))
            clean.append(self.encode_text(ids, length))
            uncond.append(clean[0] if refused is ids else self.encode_text(refused, length))
            given.append(np.arange(length) < (length if task["text"] == "given" else len(ids)))
        if task["image"]:
            count = pictures_of(task)
            size = self.bundle.graph(graph)["image_size"]
            M = (size // self.picture["patch"]) ** 2
            shown = np.zeros((count * M, latents[-1]), np.float32)
            known = M if request.picture is not None else 0
            shown[:known] = self.encode_picture(request.picture, size) if known else 0
            clean.append(shown)
            uncond.append(shown)
            given.append(np.arange(count * M) < known)
        inputs |= {"clean": np.concatenate(clean), "given": np.concatenate(given), "uncond": np.concatenate(uncond)}
        return Shape(inputs["clean"].shape, length, M if task["image"] else 0), inputs

    def text_length(self, tokens: int, generates: bool) -> int:
        """The segment length for a prompt, from the request alone: the smallest that holds it, with room if text is
        generated."""
        lengths = sorted(self.text["lengths"])
        need = tokens + (lengths[0] // 2 if generates else 0)
        for length in lengths:
            if need <= length:
                return int(length)
        room = f" and {need - tokens} are left free for the text to come" if generates else ""
        raise InputError(f"the prompt has {tokens} tokens{room}\nexpected at most {lengths[-1]} in all: shorten it")

    def encode_text(self, ids: list[int], length: int) -> Array:
        """[T,d]"""
        padded = np.full((1, length), self.text["pad"], np.int64)
        padded[0, : len(ids)] = ids
        (z,) = self.backend.graph("encode_text").run(["z"], ids=padded)
        return z[0]

    def encode_picture(self, source: Any, size: int) -> Array:
        """[M,d]"""
        low, high = self.picture["range"]
        pixels = fit(read_picture(source), size * self.picture["factor"], self.picture["channels"])
        (z,) = self.backend.graph(self.half("encode", size)).run(["z"], picture=to_numbers(pixels, low, high))
        return z[0]

    # ----------------------------------------------------------------------------------------------- after the steps

    def new_text(self, prepared: Prepared, z: Array) -> str | None:
        """The text that was generated: what follows the prompt."""
        if not makes(self.task(prepared.request.task)["text"]):
            return None
        T = prepared.shape.text
        (ids,) = self.backend.graph("decode_text").run(["ids"], z=z[None, :T])
        return self.tokenizer.decode(ids[0][~prepared.job.inputs["given"][:T]])

    def pixels(self, prepared: Prepared, z: Array) -> Array | None:
        """The picture that was generated, uint8 [H,W,C]; None where the bundle has no autoencoder for it."""
        if not makes(self.task(prepared.request.task)["image"]):
            return None
        low, high = self.picture["range"]
        size = self.bundle.graph(prepared.job.graphs[0])["image_size"]
        z = z[-prepared.shape.new :] if prepared.shape.new else z
        half = self.half("decode", size)
        if half in self.manifest["graphs"]:
            (shown,) = self.backend.graph(half).run(["picture"], z=np.ascontiguousarray(z[None]))
            self.check_finite(shown)
            return to_pixels(shown[0], low, high)
        return to_pixels(z, low, high) if z.shape[0] in (1, 3) else None  # a DiM on pixels

    def half(self, role: str, size: int) -> str:
        """The autoencoder's graph: MDM's have one for each size, an external one is for all."""
        graphs = self.manifest["graphs"]
        for name, graph in graphs.items():
            if graph["role"] == role and graph["modalities"] == ["image"] and graph["image_size"] in (None, size):
                return str(name)
        return f"{role}_image"

    def check_finite(self, z: Array) -> None:
        if not np.isfinite(z).all():
            raise EngineError(
                "the result is not finite: a graph overflowed, or the weights are damaged\n"
                "in half precision keep more layers in float32: mdm export --fp32-layers"
            )


def makes(modality: str) -> bool:
    """Whether a task generates it."""
    return modality in ("made", "both")


def pictures_of(task: dict[str, Any]) -> int:
    return {"": 0, "both": 2}.get(task["image"], 1)


def modalities_of(task: dict[str, Any]) -> list[str]:
    return [name for name in ("text", "image") if task[name]]


def start_of(request: Request, shape: tuple[int, ...]) -> Array:
    """The start noise: the seed's, or what was given."""
    if request.noise is None:
        return normal(request.seed, request.sample, START, shape)
    given = np.asarray(request.noise)
    if given.shape == shape and given.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what does not fit is refused below
            noise = given.astype(np.float32)
        if np.isfinite(noise).all():
            return noise
    raise InputError(f"noise is {given.dtype} {list(given.shape)}, expected finite float32 {list(shape)}")
