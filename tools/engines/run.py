"""Builds engines in child processes, and says what became of them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from mdm.plugins.errors import EngineError, EnvironmentLackError, MdmError
from mdm.plugins.gpu.driver import Device, Driver
from mdm.plugins.gpu.variants import check_model
from mdm.runtime.bundle import Bundle, sha256_of
from mdm.runtime.tensorrt.engines import engine_path, facts_of, record_path, timing_cache, write_whole
from mdm.runtime.tensorrt.profiles import Profile
from mdm.tools.engines.child import Request

NO_GPU = "no GPU"
SAID = 300  # characters of a child's last words


@dataclass(frozen=True)
class Engine:
    """One that is there."""

    graph: str
    path: Path
    seconds: float  # that it took to build
    built: bool  # now; else it was there already
    contents: Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """Progress: what a build does, and how many seconds all of it took the last time, if that is known."""

    graph: str
    phase: str
    last: float | None


Told = Callable[[Step], object]


def graphs_of(bundle: Bundle, wanted: Iterable[str]) -> list[str]:
    """Those asked for; else all that a run needs."""
    names = list(wanted)
    for name in names:
        bundle.graph(name)
    return names or [name for name, graph in bundle.manifest["graphs"].items() if graph["role"] != "denoise"]


def build_engines(
    bundle: Bundle, graphs: Iterable[str], profile: Profile, plugins: bool, force: bool, told: Told
) -> Iterable[Engine]:
    """One after another. An engine that is there for just this is not built again, unless `force`."""
    if plugins:
        check_model(bundle.manifest["config"])
    place = {**ask(None, lambda phase: None), "gpu": gpu()}
    for graph in graphs:
        facts = facts_of(bundle, graph, profile, place, plugins)
        path = engine_path(bundle, facts)
        record = record_path(path)
        known = read_record(record, facts)
        if known and not force and path.is_file() and sha256_of(path) == known["sha256"]:
            yield Engine(graph, path, known["seconds"], False, known["contents"])
            continue
        bundle.graph_bytes(graph)  # its hash is right
        started = time.monotonic()
        request = Request(
            str(bundle.file(bundle.graph(graph)["file"]).resolve()), str(path.parent.resolve() / path.name),
            str(timing_cache(place["tensorrt"])), facts["shapes"], profile.workspace, profile.level,
            plugins,
        )  # fmt: skip
        last = known["seconds"] if known else None
        try:
            contents = ask(request, partial(_tell, told, graph, last))
        except EngineError as error:
            raise EngineError(f"graph '{graph}' of bundle '{bundle.path}' was not built\n{error}") from error
        seconds = round(time.monotonic() - started, 1)
        told_of = {"facts": facts, "sha256": sha256_of(path), "seconds": seconds, "contents": contents}
        write_whole(record, json.dumps(told_of, indent=1).encode())
        yield Engine(graph, path, seconds, True, contents)


def _tell(told: Told, graph: str, last: float | None, phase: str) -> None:
    told(Step(graph, phase, last))


def ask(request: Request | None, told: Callable[[str], object]) -> dict[str, Any]:
    """Run a child -> what it says it has done."""
    if find_spec("tensorrt") is None:
        raise EnvironmentLackError(
            'TensorRT is not installed: the Python module tensorrt is missing\npip install "mdm-deploy[tensorrt]"'
        )
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
    if "error" in answer:
        raise EngineError(f"TensorRT says: {' '.join(answer['error'].split()):.{SAID}}\n{last_error(lines)}".rstrip())
    raise EngineError(f"TensorRT ended its process ({code})\n{last_error(lines)}".rstrip())


def last_error(lines: list[str]) -> str:
    """Of what TensorRT printed: the last line it calls an error, else the last line."""
    errors = [line for line in lines if "[E]" in line or "Error" in line]
    return " ".join((errors or lines or [""])[-1].split())[:SAID]


def gpu() -> str:
    """What engines are for. TensorRT-RTX builds without one."""
    try:
        device = Device(Driver())
    except MdmError:
        return NO_GPU
    try:
        return f"{device.name}, compute capability {'.'.join(map(str, device.capability))}"
    finally:
        device.close()


def read_record(path: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was written of an engine, if it is of these facts."""
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        whole = float(record["seconds"]) >= 0 and {"plugins", "bytes"} <= {*record["contents"]} and record["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if whole and record.get("facts") == facts else None
