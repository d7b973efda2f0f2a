"""Builds engines in child processes, and says what became of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from mdm.plugins.contract import DOMAIN, OPERATORS
from mdm.plugins.errors import EngineError, EnvironmentLackError, InputError, MdmError
from mdm.plugins.gpu.driver import Device, Driver
from mdm.plugins.gpu.variants import check_model, operators_of, workspace_limit
from mdm.runtime.bundle import Bundle
from mdm.runtime.tensorrt.engines import AMPERE, capability_of, place_of
from mdm.runtime.tensorrt.facts import Options, facts_of, settings_of
from mdm.runtime.tensorrt.profiles import MIB, Profile, Span, largest_scan
from mdm.runtime.tensorrt.records import (
    Record,
    engine_path,
    known_records,
    made_whole,
    manifest_path,
    now,
    record_path,
    timing_cache,
)
from mdm.runtime.tensorrt.versions import Kind, check_refit
from mdm.tools.engines.asked import asks_for
from mdm.tools.engines.child import Request

SAID = 300  # characters of a child's last words
ERRORS = {kind.__name__: kind for kind in (InputError, EnvironmentLackError, EngineError)}


@dataclass(frozen=True)
class Engine:
    """One that is there."""

    path: Path
    record: Record
    new: bool  # built now; else it was there already


@dataclass(frozen=True)
class Step:
    """Progress: what a build does, and how many seconds all of it took the last time, if that is known."""

    graph: str
    phase: str
    last: float | None


Told = Callable[[Step], object]


def graphs_of(bundle: Bundle, wanted: Iterable[str]) -> list[str]:
    """Those asked for; else all that a run needs."""
    names = list(dict.fromkeys(wanted))
    for name in names:
        bundle.graph(name)
    return names or [name for name, graph in bundle.manifest["graphs"].items() if graph["role"] != "denoise"]


def check_precision(bundle: Bundle, wanted: str | None) -> None:
    """An error where the bundle has another one."""
    found = bundle.manifest["precision"]
    if wanted not in (None, found):
        raise InputError(
            f"bundle '{bundle.path}' is {found}, not {wanted}: TensorRT keeps to the types in its graphs\n"
            f"export it so: mdm export CHECKPOINT -o BUNDLE --config CONFIG --precision {wanted}"
        )


def build_engines(
    bundle: Bundle, graphs: Iterable[str], profiles: Sequence[Profile], options: Options, force: bool, told: Told
) -> Iterable[Engine]:
    """One after another. An engine that is there for just this is not built again, unless `force`."""
    options.check()
    graphs = [*graphs]
    if not options.bodies:
        check_model(bundle.manifest["config"])
        for graph in graphs:
            check_workspace(bundle.manifest, graph, profiles)
    place = place_here(options)
    for graph in graphs:
        facts = facts_of(bundle, graph, profiles, options, place)
        path = engine_path(bundle, facts)
        known = known_records(path)
        there = None if force else next((record for record in known if is_there(path, record)), None)
        if there:  # the one asked for last is the one that is run
            there = replace(there, built=now())
            save(path, there)
            yield Engine(path, there, new=False)
            continue
        last = known[0].seconds if known else None
        record = build_engine(bundle, path, facts, options, last, told)
        save(path, record)
        yield Engine(path, record, new=True)


def check_workspace(manifest: Mapping[str, Any], graph: str, profiles: Sequence[Profile]) -> None:
    """An error where the plugins take more than there is: TensorRT then builds nothing, and does not say why."""
    if manifest["graphs"][graph]["role"] not in ("step", "denoise"):  # the others have no plugins
        return
    dtype = "float32" if manifest["precision"] == "fp32" else "float16"  # bfloat16 takes as much
    room = max(profile.workspace for profile in profiles)  # of the engine, for each of them
    for profile in profiles:
        B, L = largest_scan(manifest, graph, profile)
        operators = operators_of(manifest["config"])
        takes = max(workspace_limit(operator, dtype, {"B": B, "L": L, **sizes}) for operator, sizes in operators)
        if takes > room:
            raise InputError(
                f"profile '{profile.name}' gets a workspace of {room} bytes: too little for graph '{graph}'\n"
                f"expected {takes} or more: its plugins take them for {B} sequences of {L} tokens\n"
                f'in the profile\'s file write "workspace": {-(-takes // MIB)} (MiB) or more, or build with --bodies'
            )


def place_here(options: Options) -> dict[str, str]:
    """Where engines that are built now are for; an error where they cannot be built so here."""
    version = ask(None, lambda phase: None)["tensorrt"]
    if options.refit:
        check_refit(version)
    try:
        device = Device(Driver())
    except MdmError:  # TensorRT-RTX builds without one
        return place_of(version, None)
    place = place_of(version, device)
    device.close()
    if options.hardware == "ampere-plus" and capability_of(place["gpu"]) < AMPERE:
        raise EnvironmentLackError(
            f"--hardware ampere-plus: the GPU that builds has to be one\nfound {place['gpu']}, expected 8.0 or newer"
        )
    return place


def is_there(path: Path, known: Record) -> bool:
    """The engine that was built."""
    try:
        known.check_engine(path)
    except InputError:
        return False
    return True


def save(path: Path, record: Record) -> None:
    """For the bundle's users, and for this one, who trusts what was built here."""
    record.write(manifest_path(path))
    record.write(record_path(path, record.sha256))


def build_engine(
    bundle: Bundle, path: Path, facts: dict[str, Any], options: Options, last: float | None, told: Told
) -> Record:
    """Make the file, whole, or nothing."""
    graph = facts["graph"]
    what, described = f"graph '{graph}' of bundle '{bundle.path}'", bundle.graph(graph)
    bundle.graph_bytes(graph)  # its hash is right
    began = time.monotonic()
    with made_whole(path) as partial:
        model, library = bundle.file(described["file"]).resolve(), options.library
        request = Request(
            str(model), str(model.parent), described["operators"], str(partial.resolve()),
            str(timing_cache(facts["tensorrt"])), facts, str(library.resolve()) if library else None,
        )  # fmt: skip
        try:
            contents = ask(request, lambda phase: told(Step(graph, phase, last)))
        except (InputError, EnvironmentLackError) as error:
            raise type(error)(f"{what}: {error}") from error
        except EngineError as error:
            raise EngineError(f"{what} was not built\n{error}") from error
        return Record.of_engine(partial, facts, round(time.monotonic() - began, 1), now(), contents)


def build_for_shapes(
    model: Path, folder: Path, shapes: Mapping[str, tuple[int, ...]], place: Mapping[str, str], bodies: bool
) -> tuple[bytes, list[Kind]]:
    """A model of no bundle, for its inputs' shapes alone -> the engine, and the plugins that it runs. `folder`: where
    its weights are."""
    exactly = Profile("these shapes", Span(1, 1, 1))
    settings = settings_of([(exactly, {name: (shape,) * 3 for name, shape in shapes.items()})], Options(bodies=bodies))
    operators = {f"{DOMAIN}.{name}": len([*asks_for(model, name)]) for name in OPERATORS}
    with TemporaryDirectory(prefix="mdm_engine") as made:
        engine, timing = Path(made) / "engine", timing_cache(place["tensorrt"])
        request = Request(
            str(model.resolve()), str(folder.resolve()), operators, str(engine), str(timing), settings, None
        )
        contents = ask(request, lambda phase: None)
        return engine.read_bytes(), [(name, version, namespace) for name, version, namespace in contents["operators"]]


def ask(request: Request | None, told: Callable[[str], object]) -> dict[str, Any]:
    """Run a child -> what it says it has done."""
    answer: dict[str, Any] = {}
    with TemporaryFile("w+", errors="replace") as words:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "mdm.tools.engines.child"],  # -P: nothing from the folder it is started in
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(asdict(request) if request else {}))
            child.stdin.close()
            for line in child.stdout:
                answer = json.loads(line)
                if "phase" in answer:
                    told(answer["phase"])
        except BaseException:  # Ctrl-C among them: the child may run for an hour
            child.kill()
            raise
        finally:
            code = child.wait()
            child.stdout.close()
        words.seek(0)
        lines = [line for line in words.read().splitlines() if line.strip()]
    if "done" in answer:
        return dict(answer["done"])
    if "kind" in answer:
        raise ERRORS.get(answer["kind"], EngineError)(answer["error"])
    raise failure(answer.get("error"), code, lines)


def failure(said: str | None, code: int, lines: list[str]) -> MdmError:
    """What a child's end means. `said`: by itself; `lines`: what TensorRT printed."""
    last = last_error(lines)
    if "libnvinfer_lean" in last:
        return EnvironmentLackError(
            "TensorRT's lean runtime is not installed, which a version-compatible engine carries within\n"
            f"TensorRT says: {last}\npip install tensorrt-lean, in TensorRT's own version"
        )
    first = f"TensorRT says: {' '.join(said.split()):.{SAID}}" if said else f"TensorRT ended its process ({code})"
    return EngineError(f"{first}\n{last}".rstrip())


def last_error(lines: list[str]) -> str:
    """Of what TensorRT printed: the last line it calls an error, else the last line."""
    errors = [line for line in lines if "[E]" in line or "Error" in line]
    return " ".join((errors or lines or [""])[-1].split())[:SAID]
