"""Level "files": the bundle is what was signed, its graphs are valid and load, and its sampler tables are today's.

A signature is only as good as the manifest: whoever changes a file can sign it anew. So the weights are held to the
checkpoint's own hash, each graph to what it says of itself, and each table to what the runtime computes now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from mdm.plugins.errors import InputError, MdmError, ParityError, in_one_line
from mdm.runtime.backend import Backend
from mdm.runtime.bundle import Bundle, manifest_schema, sha256_of
from mdm.runtime.consistency import check_model
from mdm.runtime.json_schema import parse_json, told, validate
from mdm.runtime.model import MAX_TABLE, makes, modalities_of
from mdm.runtime.schedule import make_schedule
from mdm.runtime.solver import ROW, solver_table
from mdm.tools.check.finding import Array, Finding, Verdict

LEVEL = "files"
WEIGHTS = "weights.safetensors"  # the checkpoint itself, wherever a bundle has it
TABLE_LIMIT = 1e-9  # of a coefficient, relative to itself or to 1 if that is larger: both sides are float64


def check_files(bundle: Bundle, backend: Backend) -> Iterator[Finding]:
    yield from check_hashes(bundle)
    sound = verdict_of("manifest.json", "its parts fit", lambda: check_model(bundle.manifest, "the bundle"))
    yield sound
    if WEIGHTS in bundle.manifest["files"]:
        yield verdict_of(WEIGHTS, "the checkpoint", lambda: check_weights(bundle.manifest))
    else:
        yield skipped("weights", "the checkpoint", "they were converted from it: its hash says nothing of them")
    yield from check_graphs(bundle, backend)
    if sound.verdict is Verdict.PASS:
        yield from check_tables(bundle)
    else:
        yield skipped("sampler tables", "rows", "the manifest that they follow is not sound")


def verdict_of(subject: str, part: str, check: Callable[[], object]) -> Finding:
    try:
        check()
    except MdmError as error:
        return Finding(LEVEL, subject, part, "", Verdict.FAIL, in_one_line(error))
    return Finding(LEVEL, subject, part, "", Verdict.PASS)


def skipped(subject: str, part: str, reason: str) -> Finding:
    return Finding(LEVEL, subject, part, "", Verdict.SKIPPED, reason)


# ------------------------------------------------------------------------------------------------- hashes, weights


def check_hashes(bundle: Bundle) -> Iterator[Finding]:
    """A finding for each wrong file, or one for all if none is."""

    def check(name: str, signed: str) -> None:
        found = sha256_of(bundle.file(name))
        if found != signed:
            raise InputError(f"it was changed: its SHA-256 is {found[:16]}..., the manifest signs {signed[:16]}...")

    files = bundle.manifest["files"]
    findings = [verdict_of(name, "SHA-256", partial(check, name, signed["sha256"])) for name, signed in files.items()]
    wrong = [finding for finding in findings if finding.verdict is Verdict.FAIL]
    yield from wrong
    if not wrong:
        size = sum(signed["size"] for signed in files.values())
        yield Finding(LEVEL, "all files", "SHA-256", "", Verdict.PASS, f"{len(files)} files, {size / 1e6:.1f} MB")
    if extra := bundle.extra_files():
        more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
        yield skipped("other files", "SHA-256", f"not signed and never read: {', '.join(map(told, extra[:5]))}{more}")


def check_weights(manifest: Mapping[str, Any]) -> None:
    """Export writes this file only as a copy of the whole checkpoint: changed and signed anew, it is none any more."""
    signed, checkpoint = manifest["files"][WEIGHTS], manifest["provenance"]["checkpoint"]
    if (signed["sha256"], signed["size"]) != (checkpoint["sha256"], checkpoint["size"]):
        raise ParityError(
            f"it is not the checkpoint {told(checkpoint['file'])}: {signed['size']} bytes of SHA-256 "
            f"{signed['sha256'][:16]}..., expected {checkpoint['size']} of {checkpoint['sha256'][:16]}..."
        )


# --------------------------------------------------------------------------------------------------------- graphs


def check_graphs(bundle: Bundle, backend: Backend) -> Iterator[Finding]:
    checker = find_spec("onnx") is not None
    if not checker:
        yield skipped("graphs", "onnx.checker", "the Python module onnx is not installed")
    for name in bundle.manifest["graphs"]:
        if checker:
            yield verdict_of(name, "onnx.checker", partial(check_onnx, bundle, name))
        loads = f"loads on {backend.name}"
        if reason := backend.lacks(name):
            yield skipped(name, loads, reason)
        else:
            yield verdict_of(name, loads, partial(check_loads, bundle, backend, name))


def check_onnx(bundle: Bundle, name: str) -> None:
    """ONNX's own checks, with strict type and shape inference."""
    from onnx import checker

    bundle.graph_bytes(name)  # no file is parsed that is not the signed one
    try:
        checker.check_model(str(bundle.file(bundle.graph(name)["file"])), full_check=True)
    except Exception as error:  # the checker has many classes
        raise ParityError(f"it is not valid ONNX: {' '.join(str(error).split())[:300]}") from error


def check_loads(bundle: Bundle, backend: Backend, name: str) -> None:
    """With inputs and outputs as the manifest has them, and made when the manifest says, of what it says."""
    manifest = bundle.manifest
    written = backend.graph(name).metadata
    expected = {
        "mdm.graph": name,
        "mdm.precision": manifest["precision"],
        "mdm.checkpoint.sha256": manifest["provenance"]["checkpoint"]["sha256"],
    }
    for key, value in expected.items():
        if key in written and written[key] != value:  # other tools leave out what they do not know
            raise ParityError(f"the graph's own '{key}' is {told(written[key])}, the manifest has {told(value)}")


# --------------------------------------------------------------------------------------------------------- tables


def check_tables(bundle: Bundle) -> Iterator[Finding]:
    manifest = bundle.manifest
    for name, task in manifest["tasks"].items():
        modalities = modalities_of(task)
        clock = modalities.index("image") if makes(task["image"]) else 0
        sampler = manifest["sampler_for"].get(name, manifest["sampler"])
        facts = {"task": name, "graph": task["step"], "modalities": modalities, "sampler": sampler}
        yield check_table(bundle, task["table"], facts, clock)
    for name, graph in manifest["graphs"].items():
        if graph["role"] == "step" and graph["guided"] and graph["upsample"]:
            facts = {"graph": name, "modalities": graph["modalities"]}
            yield check_table(bundle, f"sampler/{name.removeprefix('step_')}.json", facts, 0, graph["upsample"])


def check_table(bundle: Bundle, file: str, facts: Mapping[str, Any], clock: int, upsample: int = 0) -> Finding:
    """Coefficient by coefficient against the table that the runtime makes of the manifest's schedules."""
    try:
        table = parse_json(bundle.content(file), "it", MAX_TABLE)
        if not isinstance(table, dict):
            raise InputError(f"it holds {told(table)}, expected an object")
        compare_facts(table, {**facts, "columns": list(ROW)})
        schema = manifest_schema()
        validate(table.get("sampler"), {**schema["$defs"]["sampler"], "$defs": schema["$defs"]}, "its sampler")
        settings = {key: value for key, value in table["sampler"].items() if key != "guidance"}
        schedules = [make_schedule(bundle.manifest["schedules"][modality]) for modality in facts["modalities"]]
        rows = solver_table(schedules, clock=clock, upsample={"factor": upsample} if upsample else None, **settings)
        error, said = compare_rows(table.get("rows"), rows, facts["modalities"])
    except MdmError as fault:
        return Finding(LEVEL, file, "rows", "", Verdict.FAIL, in_one_line(fault))
    verdict = Verdict.PASS if error <= TABLE_LIMIT else Verdict.FAIL
    figures = (("worst coefficient", error),)
    return Finding(LEVEL, file, "rows", "", verdict, said, rows.shape, figures=figures)


def compare_facts(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        there = found.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            compare_facts(there, value)
        elif there != value:
            raise ParityError(f"its '{key}' is {told(there)}, the manifest asks for {told(value)}")


def compare_rows(found: Any, truth: Array, modalities: Sequence[str]) -> tuple[float, str]:
    """The worst error of a coefficient, and where it is if that is too much; `truth` [S,m,22]."""
    try:
        rows = np.array(found, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError("its rows are not numbers, a list of as many for each row and modality") from error
    if rows.shape != truth.shape:
        raise ParityError(f"its rows have the shape {list(rows.shape)}, expected {list(truth.shape)}")
    off = np.abs(rows - truth) / np.maximum(1, np.abs(truth))
    at = np.unravel_index(int(off.argmax()), off.shape)
    if off[at] <= TABLE_LIMIT:
        return float(off[at]), ""
    row, modality, column = map(int, at)
    place = f"row {row}, column {ROW[column]} of {modalities[modality]}"
    return float(off[at]), f"{place}: {rows[at]:.10g}, expected {truth[at]:.10g}"
