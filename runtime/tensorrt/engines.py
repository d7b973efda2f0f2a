"""Finds the engine of a bundle's graph that this machine can run.

    place = place_of(tensorrt.__version__, device)
    path, record, content = open_engine(bundle, "step_text", place)

It has to be built from this bundle's files, for this TensorRT, GPU and platform, and it has to be trusted: see
records.py. Of several the newest is taken.
"""

from __future__ import annotations

import mmap
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from mdm.plugins.errors import InputError, in_one_line
from mdm.plugins.gpu.driver import Device
from mdm.runtime.bundle import Bundle
from mdm.runtime.tensorrt.facts import files_of, shipped_kernels
from mdm.runtime.tensorrt.profiles import PROFILES
from mdm.runtime.tensorrt.records import Record, known_records, manifests, read_record
from mdm.runtime.tensorrt.versions import version_of

NO_GPU = "no GPU"  # TensorRT-RTX builds without one
CAPABILITY = ", compute capability "
AMPERE = (8, 0)


def place_of(tensorrt: str, device: Device | None) -> dict[str, str]:
    """What engines are for."""
    gpu = f"{device.name}{CAPABILITY}{'.'.join(map(str, device.capability))}" if device else NO_GPU
    return {"tensorrt": tensorrt, "gpu": gpu, "platform": f"{sys.platform} {platform.machine()}".lower()}


def capability_of(gpu: str) -> tuple[int, ...]:
    """Of a GPU as a place has it; of none: ()."""
    return version_of(gpu.rpartition(CAPABILITY)[2]) if CAPABILITY in gpu else ()


def fits(record: Record, place: Mapping[str, str]) -> bool:
    """Whether it can run there."""
    facts = record.facts
    return (
        facts["platform"] == place["platform"]
        and _fits_tensorrt(facts["tensorrt"], place["tensorrt"], facts["version_compatible"])
        and _fits_gpu(facts["gpu"], place["gpu"], facts["hardware"])
    )


def _fits_tensorrt(built: str, ours: str, version_compatible: bool) -> bool:
    if not version_compatible:
        return built == ours  # to the last number
    older, newer = version_of(built), version_of(ours)
    return older <= newer and {older[:1], newer[:1]} <= {(10,), (11,)}


def _fits_gpu(built: str, ours: str, hardware: str) -> bool:
    theirs, here = capability_of(built), capability_of(ours)
    if not theirs or not here or hardware == "this":
        return built == ours
    return theirs == here if hardware == "same-capability" else min(theirs, here) >= AMPERE


def open_engine(
    bundle: Bundle, graph: str, place: Mapping[str, str], profile: str | None = None
) -> tuple[Path, Record, mmap.mmap]:
    """The engine's file, what is known of it, and its content in memory, which is the one that was trusted. `profile`:
    it has one of this name."""
    wrong = []
    for path, record in engines_for(bundle, graph, place, profile):
        try:
            return path, record, record.open_engine(path)
        except InputError as error:
            wrong.append(in_one_line(error))
    raise InputError(
        f"the engine of {_subject(bundle, graph)} is not the file that was built\n{wrong[0]}\n"
        f"run: {build_command(bundle, profile)} --graph {graph}"
    )


def engines_for(
    bundle: Bundle, graph: str, place: Mapping[str, str], profile: str | None = None
) -> list[tuple[Path, Record]]:
    """Those to choose from, the newest first, by what is known of them: one at least."""
    bundle.graph(graph)
    build, subject = build_command(bundle, profile), _subject(bundle, graph)
    found, passed_over = _read(bundle, graph)

    def refuse(wrong: str, remedy: str = f"run: {build}") -> InputError:
        return InputError("\n".join([wrong, *passed_over[:1], remedy]))

    if not found:
        others = any(any(manifests(bundle, name)) for name in bundle.manifest["graphs"])
        raise refuse(f"{subject} has no engine", f"run: {build}{f' --graph {graph}' if others else ''}")
    ours = [(path, record) for path, record in found if _is_of(record, bundle, graph)]
    if not ours:
        raise refuse(f"the engine of {subject} was built from another graph, other weights or other kernels")
    here = [(path, record) for path, record in ours if fits(record, place)]
    if not here:
        known = f"{place['gpu']}, TensorRT {place['tensorrt']} on {place['platform']}"
        raise refuse(f"the engine of {subject} was built for {ours[0][1].built_for}; found {known}")
    asked = [(path, record) for path, record in here if profile in (None, *record.profiles)]
    if not asked:
        there = ", ".join(sorted({name for _, record in here for name in record.profiles}))
        raise refuse(f"no engine of {subject} has the profile '{profile}', only: {there}")
    trusted = [(path, record) for path, record in asked if any(map(record.is_of, known_records(path)))]
    if not trusted:
        raise refuse(
            f"the engine of {subject} was not built here, and TensorRT runs whatever is in one",
            f"if you trust whoever made it, run: {build_command(bundle)} --trust; else: {build}",
        )
    return trusted


def build_command(bundle: Bundle, profile: str | None = None) -> str:
    """`profile`: its name; one that is none of ours came from a file of that name."""
    file = profile if profile is None or profile in PROFILES else f"{profile}.json"
    asked = "" if file is None else f" --profile {shlex.quote(file)}"
    return f"mdm build {shlex.quote(str(bundle.path))}{asked}"


def _subject(bundle: Bundle, graph: str) -> str:
    return f"graph '{graph}' of bundle '{bundle.path}'"


def _read(bundle: Bundle, graph: str) -> tuple[list[tuple[Path, Record]], list[str]]:
    """A graph's engines, the newest first, by what their manifests say; and what is wrong with other manifests."""
    found, passed_over = [], []
    for engine, manifest in manifests(bundle, graph):
        try:
            found.append((engine, read_record(manifest, engine)))
        except InputError as error:
            passed_over.append(f"passed over: {in_one_line(error)}")
    found.sort(key=lambda one: one[1].built, reverse=True)
    return found, passed_over


def _is_of(record: Record, bundle: Bundle, graph: str) -> bool:
    """Built from what the bundle has now, and for the kernels that its plugins run."""
    return (
        record.facts["files"] == files_of(bundle, graph)
        and record.facts["precision"] == bundle.manifest["precision"]
        and record.facts["kernels"] in (None, shipped_kernels())
    )
