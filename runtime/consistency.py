"""What a manifest must say so that its parts fit each other, and the runtime: more than a schema can ask for.

Graphs themselves are held to the manifest's words when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdm.plugins.errors import InputError
from mdm.runtime.json_schema import told
from mdm.runtime.schedule import make_schedule
from mdm.runtime.solver import ROW

Manifest = Mapping[str, Any]
SLOTS = 3  # of the history


def check_model(manifest: Manifest, what: str) -> None:
    def expect(holds: object, fault: str) -> None:
        if not holds:
            raise InputError(f"the manifest of {what} is not sound: {fault}\nexport the checkpoint again")

    expect(manifest["row"] == list(ROW), "a sampler's rows have other columns than this version of mdm-deploy writes")
    picture, text = manifest["picture"], manifest["text"]
    used = {modality for graph in manifest["graphs"].values() for modality in graph["modalities"]}
    used |= {modality for task in manifest["tasks"].values() for modality in ("text", "image") if task[modality]}
    expect(text or "text" not in used, "it has text graphs or tasks, but says nothing of text")
    expect(picture or "image" not in used, "it has picture graphs or tasks, but says nothing of pictures")
    for modality in used:
        expect(manifest["schedules"].get(modality), f"there is no noise schedule for {modality}")
        make_schedule(manifest["schedules"][modality])
    if picture:
        low, high = picture["range"]
        expect(low < high, f"the range of its pictures is {low} to {high}")
    for name, task in manifest["tasks"].items():
        expect(task["text"] or task["image"], f"task '{name}' has neither text nor picture")
    for name, graph in manifest["graphs"].items():
        if graph["role"] in ("step", "denoise"):
            fault = fault_of(graph, manifest)
            expect(not fault, f"graph '{name}' {fault}")


def fault_of(graph: Manifest, manifest: Manifest) -> str:
    """What is wrong with a step or denoise graph, or nothing."""
    inputs, outputs = ({t["name"]: t["shape"] for t in graph[kind]} for kind in ("inputs", "outputs"))
    latents, modalities = inputs.get("base" if graph["role"] == "step" else "z", []), graph["modalities"]
    tokens: Any = None
    if graph["pictures"]:
        size, patch = graph["image_size"], manifest["picture"]["patch"]
        if not size or size % patch:
            return f"has a picture size of {told(size)}, expected a multiple of {patch}"
        tokens = graph["pictures"] * (size // patch) ** 2
    if manifest["text"]:
        expected = ["batch", "tokens" if "text" in modalities else tokens, *latents[2:3]]
    else:
        expected = ["batch", *latents[1:2], graph["image_size"], graph["image_size"]]
    if latents != expected or not all(isinstance(n, int) and n > 0 for n in latents[1:] if n != "tokens"):
        return f"has latents of shape {latents}, expected {expected}"
    shapes = {"given": latents[:2]} if manifest["text"] else {}
    if graph["role"] == "step":
        history = ["batch", SLOTS, *latents[1:]]
        row = ["batch", len(modalities), len(ROW)]
        shapes |= {"point": latents, "noise": latents, "history": history, "row": row}
        made = {"base_next": latents, "point_next": latents, "x0": latents, "history_next": history}
        for name, shape in made.items():
            if outputs.get(name) != shape:
                return f"has an output {name} of shape {outputs.get(name)}, expected {shape}"
    for name, shape in shapes.items():
        if inputs.get(name) != shape:
            return f"has an input {name} of shape {inputs.get(name)}, expected {shape}"
    return ""
