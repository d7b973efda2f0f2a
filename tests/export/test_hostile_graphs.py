"""Graphs as an attacker may make them. The bundle reader hands out none that the manifest does not sign; and where the
attacker signs them too, a child process opens them: ONNX Runtime refuses, or dies, and no file outside is read.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper
from safetensors.torch import save_file

from mdm.export import export_bundle
from mdm.plugins.errors import InputError
from mdm.reference import SHIPPED_TOKENIZER
from mdm.runtime.bundle import open_bundle

GRAPH = "denoise_text"  # scans with function bodies, weights in both files, sizes that are open
SECRET = np.full(5000, 12345.678, np.float32)  # whoever reads it has it in an output

# Opens graphs one after the other, by path and from memory, and says of each what happened: one line of JSON.
CHILD = """
import json, resource, sys
import numpy as np, onnxruntime as ort

resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": bool}

def opened(folder, graph, in_memory):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    path = f"{folder}/{graph}.onnx"
    if in_memory:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    session = ort.InferenceSession(open(path, "rb").read() if in_memory else path, options)
    sizes = {"batch": 1, "tokens": 8}
    given = {i.name: np.zeros([sizes.get(n, n) for n in i.shape], TYPES[i.type]) for i in session.get_inputs()}
    found = session.run(None, given)
    return {"did": "ran", "secret": any(bool((np.abs(f - 12345.678) < 1).any()) for f in found if f.dtype.kind == "f")}

for place in sys.argv[2:]:
    folder, _, way = place.rpartition(":")
    print(json.dumps({"place": place, "did": "began"}), flush=True)
    try:
        result = opened(folder, sys.argv[1], way == "memory")
    except Exception as error:
        result = {"did": "refused", "said": str(error)[:200]}
    print(json.dumps({"place": place} | result), flush=True)
"""


class Found(NamedTuple):
    did: str  # "ran", "refused" or "died"
    secret: bool = False
    said: str = ""


def open_in_child(places: list[str]) -> dict[str, Found]:
    """place -> what opening it came to. A child that dies is an answer too; the next one goes on behind it."""
    found: dict[str, Found] = {}
    while left := [place for place in places if place not in found]:
        run = subprocess.run([sys.executable, "-c", CHILD, GRAPH, *left], capture_output=True, text=True, timeout=100)
        lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        assert lines, run.stderr
        for line in lines:
            place, did = line.pop("place"), line.pop("did")
            found[place] = Found("died" if did == "began" else did, **line)
        assert run.returncode == 0 or found[place].did == "died", run.stderr
    return found


# ---------------------------------------------------------------------------------------------------------- variants

Change = Callable[[ModelProto, Path], Any]


def leak(model: ModelProto, location: str, offset: int | None = 0, count: int = 64) -> None:
    """Another output: the values of a weight that is said to lie there."""
    tensor = TensorProto(name="leaked", data_type=TensorProto.FLOAT, dims=[count])
    tensor.data_location = TensorProto.EXTERNAL
    facts = {"location": location} | ({} if offset is None else {"offset": str(offset), "length": str(4 * count)})
    for key, value in facts.items():
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)
    model.graph.node.append(helper.make_node("Identity", ["leaked"], ["leak"], name="leak"))
    model.graph.output.append(helper.make_tensor_value_info("leak", TensorProto.FLOAT, [count]))


def linked(model: ModelProto, folder: Path, name: str, target: str | Path, below: str = "") -> None:
    (folder / name).symlink_to(target)
    leak(model, name + below)


def moved(model: ModelProto, **facts: str) -> None:
    """The first weight lies elsewhere."""
    tensor = next(t for t in model.graph.initializer if t.external_data)
    for entry in tensor.external_data:
        entry.value = facts.get(entry.key, entry.value)


def weight(model: ModelProto) -> TensorProto:
    return next(t for t in model.graph.initializer if t.external_data and len(t.dims) > 1)


def called(model: ModelProto) -> None:
    """A function that calls itself."""
    body = model.functions[0]
    del body.node[:]
    body.node.add(op_type=body.name, domain=body.domain, input=list(body.input), output=list(body.output))


def absent(model: ModelProto) -> None:
    """A function's body adds an input that the caller leaves out: this kills ONNX Runtime 1.31."""
    body = model.functions[0]
    last = body.node[-1]
    last.CopyFrom(helper.make_node("Sum", [last.input[0], "more"], [last.output[0]]))
    body.input.append("more")


def nested(depth: int = 3000) -> bytes:
    """A graph in a graph in a graph, as the bytes of a file: model.graph, then .node.attribute.g again and again."""
    content = b""
    for field in [7, *(1, 5, 6) * depth][::-1]:
        size, length = b"", len(content)
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        content = bytes([field << 3 | 2]) + size + bytes([length]) + content
    return content


# Weights that lie outside of the bundle: to be refused, whatever else.
OUTSIDE: dict[str, Change] = {
    "up": lambda m, folder: leak(m, "../secret"),
    "up from inside": lambda m, folder: leak(m, "sampler/../../secret"),
    "up by a dot": lambda m, folder: leak(m, "./../secret"),
    "absolute": lambda m, folder: leak(m, str(folder.parent / "secret")),
    "absolute inside": lambda m, folder: leak(m, str(folder / ".." / "secret")),
    "passwords": lambda m, folder: leak(m, "../../../../../../../../etc/passwd"),
    "no length": lambda m, folder: leak(m, "../secret", None),
    "link": lambda m, folder: linked(m, folder, "x.safetensors", "../secret"),
    "link of a folder": lambda m, folder: linked(m, folder, "x", "..", "/secret"),
    "absolute link": lambda m, folder: linked(m, folder, "x.safetensors", folder.parent / "secret"),
    "device": lambda m, folder: leak(m, "/dev/zero"),
}
WRONG: dict[str, Change] = {
    "nothing": lambda m, folder: leak(m, "nothing"),
    "a folder": lambda m, folder: leak(m, "sampler"),
    "behind the end": lambda m, folder: moved(m, offset="900000000"),
    "negative": lambda m, folder: moved(m, offset="-8"),
    "around": lambda m, folder: moved(m, offset=str(2**63 - 8)),
    "beyond": lambda m, folder: moved(m, offset=str(2**64 + 64)),
    "no number": lambda m, folder: moved(m, offset="0x10"),
    "long": lambda m, folder: moved(m, length=str(2**62)),
    "huge": lambda m, folder: weight(m).dims.__setitem__(0, 2**40),
    "overflowing": lambda m, folder: weight(m).dims.extend([2**31, 2**33]),
    "negative size": lambda m, folder: weight(m).dims.__setitem__(0, -1),
    "integers": lambda m, folder: setattr(weight(m), "data_type", TensorProto.INT32),
    "texts": lambda m, folder: setattr(weight(m), "data_type", TensorProto.STRING),
    "no type": lambda m, folder: setattr(weight(m), "data_type", 99),
    "circle": lambda m, folder: m.graph.node[0].input.__setitem__(0, m.graph.node[-1].output[0]),
    "twice": lambda m, folder: m.graph.node.append(m.graph.node[0]),
    "unknown": lambda m, folder: setattr(m.graph.node[0], "op_type", "NoSuchOperator"),
    "foreign": lambda m, folder: setattr(m.graph.node[0], "domain", "com.evil"),
    "calls itself": lambda m, folder: called(m),
    "absent input": lambda m, folder: absent(m),
    "nested": lambda m, folder: nested(),
    "future": lambda m, folder: setattr(m.opset_import[0], "version", 9999),
    "no opset": lambda m, folder: m.opset_import.pop(),
    "empty": lambda m, folder: m.graph.Clear(),
}
SOUND: dict[str, Change] = {
    "sound": lambda m, folder: None,
    "leak inside": lambda m, folder: (shutil.copyfile(folder.parent / "secret", folder / "x"), leak(m, "x")),
}


def spoiled(content: bytes, kind: str, number: int) -> bytes:
    """The same at every run: a graph cut, with bits flipped, with pieces exchanged, or with another constant."""
    draw = random.Random(f"{kind} {number}")
    made = bytearray(content)
    if kind == "cut":
        return content[: draw.randrange(len(content))]
    if kind == "constant":  # a shape, an axis, an index: the file stays sound, and what it says is not
        model = onnx.ModelProto.FromString(content)
        tensor = draw.choice([t for t in model.graph.initializer if t.raw_data and t.data_type == TensorProto.INT64])
        made = bytearray(tensor.raw_data)
    if kind == "piece":
        start, to, length = draw.randrange(len(made)), draw.randrange(len(made)), draw.randrange(1, 300)
        made[to : to + length] = content[start : start + length]
    else:
        for _ in range(1 + number % 3):
            bit = draw.randrange(8 * len(made))
            made[bit // 8] ^= 1 << bit % 8
    if kind == "constant":
        tensor.raw_data = bytes(made)
        return model.SerializeToString()
    return bytes(made)


NOISE = [("cut", n) for n in range(3)] + [("flip", n) for n in range(9)] + [("piece", n) for n in range(3)]
NOISE += [("constant", n) for n in range(10)]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Any], tiny_model: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    save_file(tiny_model().state_dict(), folder / "m.safetensors")
    return export_bundle(
        folder / "m.safetensors", tiny(), folder / "a.bundle", tokenizer=SHIPPED_TOKENIZER, validate=False
    )


@pytest.fixture(scope="module")
def hostile(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """variant -> a bundle with that graph, under the sound one's manifest. Beside each lies a secret."""
    made = {}
    for name, change in [*(OUTSIDE | WRONG | SOUND).items(), *((f"{kind} {n}", (kind, n)) for kind, n in NOISE)]:
        home = tmp_path_factory.mktemp("hostile")
        made[name] = folder = Path(shutil.copytree(sound, home / "a.bundle"))
        SECRET.tofile(home / "secret")
        file = folder / f"{GRAPH}.onnx"
        if isinstance(change, tuple):
            file.write_bytes(spoiled(file.read_bytes(), *change))
        else:
            model = onnx.load(file, load_external_data=False)
            whole = change(model, folder)
            file.write_bytes(whole if isinstance(whole, bytes) else model.SerializeToString())
    return made


@pytest.fixture
def signed(hostile: dict[str, Path]) -> Iterator[dict[str, Path]]:
    """The same bundles, and the attacker signs too."""
    before = {folder: (folder / "manifest.json").read_bytes() for folder in hostile.values()}
    for folder, text in before.items():
        manifest, file = json.loads(text), folder / f"{GRAPH}.onnx"
        content = file.read_bytes()
        manifest["files"][file.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    yield hostile
    for folder, text in before.items():
        (folder / "manifest.json").write_bytes(text)


def test_a_graph_that_is_not_signed_is_not_handed_out(sound: Path, hostile: dict[str, Path]) -> None:
    assert open_bundle(sound).graph_bytes(GRAPH) == (sound / f"{GRAPH}.onnx").read_bytes()
    for name, folder in hostile.items():
        if name == "sound":
            continue
        with pytest.raises(InputError) as caught:
            open_bundle(folder).graph_bytes(GRAPH)
        assert f"{GRAPH}.onnx" in str(caught.value), name
        # Of the right size too: nothing but the hash tells.
        file = folder / f"{GRAPH}.onnx"
        content, size = file.read_bytes(), (sound / f"{GRAPH}.onnx").stat().st_size
        file.write_bytes(content[:size].ljust(size, b"\0"))
        with pytest.raises(InputError, match="is not the file that the manifest signs"):
            open_bundle(folder).graph_bytes(GRAPH)
        file.write_bytes(content)


def test_a_signed_graph_reads_nothing_outside(signed: dict[str, Path]) -> None:
    """Whatever ONNX Runtime does with it, it does in a child, and no output holds the secret."""
    places = {}
    for name, folder in signed.items():
        assert open_bundle(folder).graph_bytes(GRAPH) == (folder / f"{GRAPH}.onnx").read_bytes()
        places |= {f"{folder}:{way}": (name, way) for way in ("path", "memory")}
    found = {places[place]: result for place, result in open_in_child(list(places)).items()}
    for (name, way), result in sorted(found.items()):
        print(f"{name:20} {way:7} {result.did:8} {result.said[:80]!r}")

    for way in ("path", "memory"):
        assert found["sound", way] == Found("ran")
        assert found["leak inside", way] == Found("ran", secret=True)  # so it would be noticed
        for name in OUTSIDE:
            assert found[name, way].did == "refused", (name, way, found[name, way])
        for name in WRONG:
            assert found[name, way].did in ("refused", "died"), (name, way, found[name, way])
        for name, n in NOISE:
            assert not found[f"{name} {n}", way].secret


def test_links_in_a_bundle_are_never_followed(signed: dict[str, Path]) -> None:
    """The reader names them; signed as files of the bundle they are refused."""
    for folder in (signed["link"], signed["absolute link"]):
        assert "x.safetensors" in open_bundle(folder).extra_files()
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["x.safetensors"] = {"size": SECRET.nbytes, "sha256": "0" * 64}
        before = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match="is a link"):
            open_bundle(folder)
        (folder / "manifest.json").write_bytes(before)


def test_a_child_that_dies_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness itself: death in the middle neither hides what came before nor stops what comes after."""
    fatal = "import os, json, sys\nfor place in sys.argv[2:]:\n    print(json.dumps({'place': place, 'did': 'began'}), "
    fatal += "flush=True)\n    if 'b' in place: os.kill(os.getpid(), 11)\n"
    fatal += "    print(json.dumps({'place': place, 'did': 'ran'}), flush=True)\n"
    monkeypatch.setitem(globals(), "CHILD", fatal)
    assert open_in_child(["a", "b", "c"]) == {"a": Found("ran"), "b": Found("died"), "c": Found("ran")}
