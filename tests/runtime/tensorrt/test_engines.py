"""Which engine is found: that of this bundle, for this place, trusted; and what is said where there is none."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mdm.plugins.errors import InputError
from mdm.runtime.bundle import Bundle
from mdm.runtime.tensorrt import engines
from mdm.runtime.tensorrt.engines import NO_GPU, fits, open_engine, place_of
from mdm.runtime.tensorrt.facts import Options, facts_of, key_of
from mdm.runtime.tensorrt.profiles import PROFILES
from mdm.runtime.tensorrt.records import MAX_RECORD, Record, engine_path, manifest_path, read_record, record_path

GRAPH = "step_text"
H200 = {"tensorrt": "11.4.0.106", "gpu": "NVIDIA H200, compute capability 9.0", "platform": "linux x86_64"}
PLAIN = Options()
Build = Callable[..., tuple[Path, Record]]


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    graph = {
        "file": f"{GRAPH}.onnx", "weights": ["w.safetensors"], "role": "step", "image_size": None, "pictures": 0,
        "inputs": [{"name": "base", "shape": ["batch", "tokens", 16]}],
    }  # fmt: skip
    manifest: dict[str, Any] = {
        "precision": "fp16", "graphs": {GRAPH: graph, f"{GRAPH}_guided": graph},
        "picture": {"size": 32, "factor": 1, "patch": 4}, "text": {"lengths": [8, 20]},
        "files": {name: {"sha256": letter * 64} for name, letter in ((f"{GRAPH}.onnx", "a"), ("w.safetensors", "b"))},
    }  # fmt: skip
    (tmp_path / "a bundle").mkdir()
    return Bundle(tmp_path / "a bundle", manifest)


@pytest.fixture
def build(bundle: Bundle) -> Build:
    """build(second=5, trusted=False, ...): an engine of that second, as `mdm build` leaves it."""

    def made(
        second: int = 0,
        place: dict[str, str] = H200,
        trusted: bool = True,
        profiles: tuple[str, ...] = ("latency",),
        options: Options = PLAIN,
        **changes: Any,
    ) -> tuple[Path, Record]:
        facts = facts_of(bundle, GRAPH, [PROFILES[name] for name in profiles], options, place) | changes
        path = engine_path(bundle, facts)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"engine {second}".encode())
        contents = {"layers": 9, "plugins": 2, "operators": [["MambaSsdScan", "1", "mdm"]]}
        record = Record.of_engine(path, facts, 1.5, f"2026-01-31T12:00:{second:02}.000Z", contents)
        record.write(manifest_path(path))
        if trusted:
            record.write(record_path(path, record.sha256))
        return path, record

    return made


def find_engine(*asked: Any) -> tuple[Path, Any]:
    path, record, content = open_engine(*asked)
    content.close()
    return path, record


def refusal(bundle: Bundle, **words: Any) -> str:
    with pytest.raises(InputError) as caught:
        find_engine(bundle, GRAPH, words.pop("place", H200), *words.values())
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value).replace(str(bundle.path), "B")


def test_the_newest_is_found(bundle: Bundle, build: Build) -> None:
    build(second=1)
    newest = build(second=7, options=Options(level=5))
    build(second=3, options=Options(level=0))
    build(second=9, place=H200 | {"gpu": "NVIDIA L4, compute capability 8.9"})
    assert find_engine(bundle, GRAPH, H200) == newest
    assert read_record(manifest_path(newest[0]), newest[0]) == newest[1]


def test_what_a_record_tells(build: Build) -> None:
    """To those who run the engine."""
    _, plain = build()
    assert (plain.operators, plain.profiles) == ([("MambaSsdScan", "1", "mdm")], ["latency"])
    assert (plain.stripped, plain.streams, plain.carries_code) == (False, False, False)
    for option, told in (("strip", "stripped"), ("stream_weights", "streams"), ("version_compatible", "carries_code")):
        assert getattr(build(options=replace(Options(bodies=True), **{option: True}))[1], told)


def test_a_profile_that_is_asked_for(bundle: Bundle, build: Build) -> None:
    build(second=5)
    both = build(second=1, profiles=("latency", "edge"))
    assert find_engine(bundle, GRAPH, H200, "edge") == both
    assert refusal(bundle, profile="a fast one") == (
        f"no engine of graph '{GRAPH}' of bundle 'B' has the profile 'a fast one', only: edge, latency\n"
        "run: mdm build 'B' --profile 'a fast one.json'"
    )


def test_a_place() -> None:
    device: Any = SimpleNamespace(name="NVIDIA H200", capability=(9, 0))
    assert place_of("11.4.0", device)["gpu"] == H200["gpu"]
    assert place_of("11.4.0", None)["gpu"] == NO_GPU
    assert engines.capability_of(H200["gpu"]) == (9, 0)
    assert engines.capability_of(NO_GPU) == ()


L4, L40, T4 = (f"NVIDIA {name}, compute capability {c}" for name, c in (("L4", "8.9"), ("L40", "8.9"), ("T4", "7.5")))
GPUS = (H200["gpu"], L4, L40, T4, NO_GPU)
OTHERS = {  # which other GPUs run it, by what it was built for and on
    "this": set(),
    "same-capability": {(L4, L40), (L40, L4)},
    "ampere-plus": {*itertools.permutations((H200["gpu"], L4, L40), 2)},
}  # fmt: skip


@pytest.mark.parametrize("hardware", OTHERS)
def test_which_gpus_run_it(build: Build, hardware: str) -> None:
    for built, ours in itertools.product(GPUS, GPUS):
        _, record = build(place=H200 | {"gpu": built}, hardware=hardware)
        too_old = hardware == "ampere-plus" and built == T4
        expected = (built == ours and not too_old) or (built, ours) in OTHERS[hardware]
        assert fits(record, H200 | {"gpu": ours}) == expected, (built, ours)


@pytest.mark.parametrize(
    ("built", "ours", "exact", "compatible"),
    [
        ("11.4.0.106", "11.4.0.106", True, True),
        ("11.4.0.106", "11.4.0.107", False, True),
        ("11.4.0.106", "11.3.0.1", False, False),
        ("10.9.0", "10.13.0", False, True),
        ("10.13.0", "10.9.0", False, False),
        ("10.3.0", "11.4.0", False, True),
        ("11.0.0", "10.16.0", False, False),
        ("9.3.0", "10.3.0", False, False),
        ("11.4.0", "12.0.0", False, False),
    ],
)
def test_which_tensorrt_runs_it(build: Build, built: str, ours: str, exact: bool, compatible: bool) -> None:
    for version_compatible, expected in ((False, exact), (True, compatible)):
        _, record = build(place=H200 | {"tensorrt": built}, version_compatible=version_compatible)
        assert fits(record, H200 | {"tensorrt": ours}) == expected
        assert not fits(record, H200 | {"tensorrt": ours, "platform": "linux aarch64"})


def test_none_is_there(bundle: Bundle, build: Build) -> None:
    """Nor of another graph: then all that a task needs is to be built."""
    said = f"graph '{GRAPH}' of bundle 'B' has no engine\nrun: mdm build 'B'"
    assert refusal(bundle) == said
    assert refusal(bundle, profile="throughput") == f"{said} --profile throughput"
    path, _ = build()
    for suffix in (".engine", ".json"):  # another graph's, whose name only begins as ours
        path.with_suffix(suffix).rename(path.with_name(f"{GRAPH}_guided-{path.stem[-16:]}{suffix}"))
    assert refusal(bundle) == f"{said} --graph {GRAPH}"
    with pytest.raises(InputError, match="has no graph 'step_txt'"):
        find_engine(bundle, "step_txt", H200)


def test_one_for_something_else(bundle: Bundle, build: Build) -> None:
    build(place={"tensorrt": "10.13.0", "gpu": L4, "platform": "linux x86_64"})
    assert refusal(bundle) == (
        f"the engine of graph '{GRAPH}' of bundle 'B' was built for {L4}, TensorRT 10.13.0 on linux x86_64; "
        f"found {H200['gpu']}, TensorRT 11.4.0.106 on linux x86_64\nrun: mdm build 'B'"
    )


def test_one_from_something_else(bundle: Bundle, build: Build) -> None:
    """Another graph, other weights, another precision, or kernels that the plugins no longer have."""
    for changes in (
        {"files": {f"{GRAPH}.onnx": "a" * 64, "w.safetensors": "c" * 64}},
        {"files": {f"{GRAPH}.onnx": "a" * 64}},
        {"precision": "fp32"},
        {"kernels": "d" * 64},
    ):
        path, _ = build(**changes)
        assert "was built from another graph, other weights or other kernels" in refusal(bundle), changes
        manifest_path(path).unlink()
    build(kernels=None, library="d" * 64)  # its plugins are not ours to know
    find_engine(bundle, GRAPH, H200)


def test_one_that_was_not_built_here(bundle: Bundle, build: Build) -> None:
    """Nor one that says of itself what was built here: of a name, or of all but the hash."""
    path, record = build(second=9, trusted=False)
    expected = (
        f"the engine of graph '{GRAPH}' of bundle 'B' was not built here, and TensorRT runs whatever is in one\n"
        "if you trust whoever made it, run: mdm build 'B' --trust; else: mdm build 'B'"
    )
    assert refusal(bundle) == expected
    replace(record, sha256="0" * 64).write(record_path(path, "0" * 64))
    assert refusal(bundle) == expected
    older = build(second=1, options=Options(level=0))
    assert find_engine(bundle, GRAPH, H200) == older


def test_an_engine_that_was_changed(bundle: Bundle, build: Build) -> None:
    older = build(second=1, options=Options(level=0))
    path, _ = build(second=9)
    for content in (b"engine 8", b"a longer engine"):
        path.write_bytes(content)
        assert find_engine(bundle, GRAPH, H200) == older
    older[0].unlink()
    said = refusal(bundle)
    assert "is not the file that was built\n'B/engines/" in said
    assert said.endswith(f"run: mdm build 'B' --graph {GRAPH}")


def test_links_are_not_followed(bundle: Bundle, build: Build, tmp_path: Path) -> None:
    path, _ = build()
    for victim in (path, manifest_path(path)):
        outside = tmp_path / victim.name
        victim.rename(outside)
        victim.symlink_to(outside)
        assert f"{victim.name}' is not a regular file" in refusal(bundle)
        victim.unlink()
        outside.rename(victim)
    find_engine(bundle, GRAPH, H200)
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    assert "engines' is a link, expected a folder" in refusal(bundle)


def spoil(place: str, value: Any) -> Callable[[dict[str, Any]], bytes]:
    def spoiled(fields: dict[str, Any]) -> bytes:
        *outer, last = place.split(".")
        at = fields
        for key in outer:
            at = at[key]
        if value is None:
            del at[last]
        else:
            at[last] = value
        return json.dumps(fields).encode()

    return spoiled


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fields: b"{", "is not sound JSON"),
        (lambda fields: b"\xff", "is not sound JSON"),
        (lambda fields: b"[" * 10000, "nests deeper"),
        (lambda fields: b" " * (MAX_RECORD + 1), f"expected at most {MAX_RECORD}"),
        (lambda fields: b"[]", "the document is a list of 0; expected object"),
        (spoil("facts", None), "lacks the key 'facts'"),
        (spoil("more", 1), "has the unknown key 'more'"),
        (spoil("facts.builder", 1), "is 1; expected 2"),
        (spoil("facts.strip", 1), "expected boolean"),
        (spoil("facts.profiles", []), "expected 1 to 1000 items"),
        (spoil("facts.hardware", "any"), "expected one of"),
        (spoil("facts.gpu", "a\nb"), "expected a line of text"),
        (spoil("facts.files", {"w.safetensors": "../x"}), "expected a SHA-256"),
        (spoil("bytes", -1), "expected a number from 1"),
        (spoil("built", "tomorrow"), "expected a time in UTC"),
        (spoil("contents.operators", [["MambaSsdScan"]]), "expected 3 to 3 items"),
        (spoil("facts.level", 5), "is of another engine: 'step_text-"),
        (spoil("facts.graph", "../../x"), "is of another engine: '../../x-"),
    ],
)
def test_a_broken_manifest_is_passed_over(bundle: Bundle, build: Build, change: Any, said: str) -> None:
    """And named where no other engine does; nor is the user's own record believed if it is broken."""
    path, record = build(second=9)
    content = change(json.loads(json.dumps(asdict(record))))
    manifest_path(path).write_bytes(content)
    told = refusal(bundle)
    assert f"has no engine\npassed over: 'B/engines/{path.stem}.json'" in told
    assert said in told
    older = build(second=1, options=Options(level=0))
    assert find_engine(bundle, GRAPH, H200) == older
    record.write(manifest_path(path))
    record_path(path, record.sha256).write_bytes(content)
    assert find_engine(bundle, GRAPH, H200) == older


def test_the_key_is_of_every_fact(bundle: Bundle) -> None:
    facts = facts_of(bundle, GRAPH, [PROFILES["latency"]], Options(), H200)
    keys = {key_of(facts)} | {key_of(facts | {name: "other"}) for name in facts}
    assert len(keys) == len(facts) + 1
    assert facts["level"] == 4
    several = facts_of(bundle, GRAPH, [PROFILES["edge"], PROFILES["throughput"]], Options(), H200)
    assert (several["level"], several["workspace"]) == (4, 4096 * 2**20)
    assert [profile["name"] for profile in several["profiles"]] == ["edge", "throughput"]
    assert facts_of(bundle, GRAPH, [PROFILES["edge"]], Options(level=0), H200)["level"] == 0


def test_what_does_not_go_together(tmp_path: Path) -> None:
    library = tmp_path / "plugins.so"
    wrong = [
        (Options(strip=True, refit=True), "--strip does not go with --refit"),
        (Options(bodies=True, library=library), "--bodies does not go with --library"),
        (Options(version_compatible=True), "--version-compatible does not go with the plugins in Python"),
    ]
    for options, said in wrong:
        with pytest.raises(InputError, match=said):
            options.check()
    for sound in (
        Options(strip=True, stream_weights=True, hardware="ampere-plus", library=library, version_compatible=True),
        Options(refit=True, stream_weights=True, bodies=True, version_compatible=True),
    ):
        sound.check()


def test_nothing_is_kept_beside_the_records(build: Build) -> None:
    path, record = build()
    assert {*os.listdir(path.parent)} == {path.name, manifest_path(path).name}
    kept = record_path(path, record.sha256)
    assert os.listdir(kept.parent) == [kept.name]


def test_two_copies_of_a_bundle(bundle: Bundle, build: Build) -> None:
    """Their engines have one name: what is known of the one is not forgotten for the other."""
    path, record = build(second=1)
    first = path.read_bytes()
    other = build(second=2)  # over the first, as if in the other copy
    assert find_engine(bundle, GRAPH, H200) == other
    path.write_bytes(first)
    record.write(manifest_path(path))
    assert find_engine(bundle, GRAPH, H200) == (path, record)
    again = replace(record, built="2026-01-31T12:00:09.000Z", seconds=9.5)  # the same, byte for byte
    again.write(record_path(path, record.sha256))
    assert find_engine(bundle, GRAPH, H200) == (path, record)
    replace(again, facts=again.facts | {"hardware": "ampere-plus"}).write(record_path(path, record.sha256))
    assert "was not built here" in refusal(bundle)
