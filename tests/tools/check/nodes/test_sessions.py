"""What is checked beside a bundle's graphs, in TensorRT's own parser and builder: operators alone, a graph with probes,
single nodes. What their engines compute is seen with a stand-in, in tests/runtime/tensorrt/inside/check_sessions.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from onnx import ModelProto, load_model_from_string

from mdm.plugins.errors import EngineError
from mdm.reference import SHIPPED_TOKENIZER, load_config
from mdm.reference.checkpoint import build_model
from mdm.runtime.bundle import open_bundle
from mdm.runtime.tensorrt.engines import place_of
from mdm.tools.check.finding import Array
from mdm.tools.check.levels.operators import TYPES, Case, drawn, one_node, sizes_of, subjects_of
from mdm.tools.check.limits import Multiples
from mdm.tools.check.nodes.bisect import Bisection
from mdm.tools.check.nodes.sessions import with_constants
from mdm.tools.check.nodes.submodel import weights_through
from mdm.tools.engines import run

from ..drawn import Drawn, draw

STEPS = {"mdm": "step_joint_guided", "dim": "step_image_guided"}
# Of these the first node of each is cut out: plugins, and what takes sizes or places, which are built in.
CUT = ("mdm.MambaSsdScan", "mdm.MambaShortConv", "MatMul", "Slice", "Range", "Reshape", "Expand", "Gather")
Make = Callable[[str, str], Drawn]


class Said(NamedTuple):
    """Of one build: bytes, layers, how many of them are plugins, and those by name."""

    bytes: int
    layers: int
    plugins: int
    kinds: list[str]


Build = Callable[..., Said]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Make:
    """make("mdm", "fp16")"""

    @cache
    def one(family: str, precision: str) -> Drawn:
        config = tiny(state=16, head=32, keep=0.5) if family == "mdm" else tiny(family="dim", state=16)
        options: dict[str, Any] = {"tokenizer": SHIPPED_TOKENIZER} if family == "mdm" else {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tensors = build_model(load_config(config)).state_dict()
        return draw(tmp_path_factory.mktemp("model"), config, tensors, precision=precision, **options)

    return one


@pytest.fixture
def build(rig: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """build(content, folder, feeds, bodies=False): as a BuiltSession has it built, by a child that has the rig."""
    for name in ("LD_LIBRARY_PATH", "PYTHONPATH"):
        monkeypatch.setenv(name, rig[name])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    contents: list[Mapping[str, Any]] = []
    asked = run.ask

    def ask(*words: Any) -> dict[str, Any]:
        contents.append(asked(*words))
        return dict(contents[-1])

    monkeypatch.setattr(run, "ask", ask)
    place = place_of(asked(None, lambda phase: None)["tensorrt"], None)

    def of(content: bytes, folder: Path, feeds: Mapping[str, Array], bodies: bool = False) -> Said:
        sizes = {name: array for name, array in feeds.items() if array.dtype.kind == "i" and array.ndim < 2}
        model = tmp_path / "model.onnx"
        model.write_bytes(with_constants(content, sizes))
        shapes = {name: array.shape for name, array in feeds.items() if name not in sizes}
        plan, kinds = run.build_for_shapes(model, folder, shapes, place, bodies)
        return Said(len(plan), contents[-1]["layers"], contents[-1]["plugins"], [name for name, *_ in kinds])

    return of


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", STEPS)
def test_operators_alone(family: str, precision: str, make: Make, build: Build) -> None:
    """By plugin one layer is one; by body none is, and there are many more."""
    folder = make(family, precision).folder
    bundle = open_bundle(folder)
    subjects = subjects_of(bundle)
    assert len(subjects) == 2
    for subject in subjects:
        sizes = {**sizes_of(bundle.manifest["config"]), "B": 2, "L": 65}
        feeds = drawn(subject, sizes, TYPES[precision], Case(65, 2, False, 0))
        content = one_node(subject, TYPES[precision])
        ours, body = (build(content, folder, feeds, bodies) for bodies in (False, True))
        assert (ours.plugins, ours.kinds) == (1, [subject.operator.name])
        assert (body.plugins, body.kinds) == (0, [])
        assert body.layers > 10 * ours.layers > 0
        assert min(ours.bytes, body.bytes) > 10_000


class Cut(NamedTuple):
    model: ModelProto
    feeds: dict[str, Array]


def bisected(one: Drawn, graph: str) -> tuple[Bisection, list[Cut]]:
    """A bisection whose backend takes note of what it is given, and runs nothing."""
    seen: list[Cut] = []

    def note(model: ModelProto, feeds: dict[str, Array], wanted: list[str]) -> list[Array]:
        seen.append(Cut(model, feeds))
        raise EngineError("not run")

    file, blueprint = one.file(graph), one.blueprint.model(graph)
    made = Bisection(graph, file, blueprint, one.values(graph), one.inputs(graph), note, Multiples(), None)
    return made, seen


@pytest.mark.parametrize(("family", "precision"), [("mdm", "bf16"), ("dim", "fp16")])
def test_a_graph_with_probes(family: str, precision: str, make: Make, build: Build) -> None:
    one = make(family, precision)
    bisection, seen = bisected(one, STEPS[family])
    bisection.run_whole()
    (whole,) = seen
    nodes = sum(node.domain == "mdm" for node in whole.model.graph.node)
    assert nodes == 6
    assert len(whole.model.graph.output) > len(one.file(STEPS[family]).graph.output) + 5
    assert {name for name, array in whole.feeds.items() if array.dtype.kind == "i"} >= {"y"}
    assert build(whole.model.SerializeToString(), one.folder, whole.feeds).plugins == nodes


def test_nodes_cut_out(make: Make, build: Build) -> None:
    """A part from its true inputs, single nodes, and weights, which are a model without inputs."""
    one = make("mdm", "fp16")
    bisection, seen = bisected(one, STEPS["mdm"])
    operators = [bisection.op_of(pair) for pair in bisection.pairs]
    block = next(part for part in bisection.parts if part.name.endswith("blocks.0"))
    truth, found = bisection.deployed.given(bisection.inputs), {}
    for place, operator in enumerate(operators):
        if place == block.start:
            bisection.judge(block.start, block.end, dict(truth))
            found["a block"] = seen[-1]
        seen.clear()
        stretch = bisection.judge(place, place + 1, truth)
        if seen:
            found.setdefault(operator, seen[-1])
        truth |= stretch.next
        if {*found} >= {"a block", *CUT}:
            break
    built = {name: build(found[name].model.SerializeToString(), one.folder, found[name].feeds) for name in
             ("a block", *CUT)}  # fmt: skip
    assert {name: said.plugins for name, said in built.items()} == {
        "a block": 2, **{name: int(name.startswith("mdm.")) for name in CUT}
    }  # fmt: skip
    assert built["a block"].layers > 30 > built["MatMul"].layers

    names = [name for name, tensor in bisection.file.weights.items() if tensor.data_location][:3]
    seen.clear()
    with pytest.raises(EngineError, match="not run"):
        weights_through(bisection.run, bisection.file, names)
    assert not seen[-1].feeds
    assert build(seen[-1].model.SerializeToString(), one.folder, {}).bytes > 0


def test_constants_take_the_place_of_inputs(make: Make) -> None:
    """The others stay as they are, in their order."""
    one = make("mdm", "fp16")
    content = (one.folder / f"{STEPS['mdm']}.onnx").read_bytes()
    before = [i.name for i in load_model_from_string(content).graph.input]
    values = {name: one.inputs(STEPS["mdm"])[name] for name in ("uncond_y", "y")}
    after = load_model_from_string(with_constants(content, values)).graph
    assert [i.name for i in after.input] == [name for name in before if name not in values]
    assert [(t.name, list(t.dims)) for t in after.initializer][-2:] == [("uncond_y", [2]), ("y", [2])]
