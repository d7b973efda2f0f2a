"""`mdm plan` on bundles: its numbers against TensorRT's own parser, its words, and what stops a build."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto, TensorProto, helper

from mdm.runtime.bundle import open_bundle
from mdm.runtime.tensorrt.profiles import PROFILES, shapes_of
from mdm.tools.main import main

ROOT = Path(__file__).parents[3]
Spoil = Callable[[Path, str, Callable[[ModelProto], bytes | None]], Path]
Out = pytest.CaptureFixture[str]


def planned(capsys: Out, bundle: Path, *words: str, code: int = 0) -> dict[str, Any]:
    assert main(["plan", str(bundle), "--json", *words]) == code
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["fits"] == (code == 0)
    return told


def in_rig(rig: dict[str, str], child: Path, **request: Any) -> list[dict[str, Any]]:
    """What TensorRT says of models, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(child)], input=json.dumps(request), env=rig, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return list(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("name", "changes"), [("mdm-tiny", {}), ("dim", {"state": 16}), ("mdm", {"mixer": "mamba1", "state": 16})]
)
@pytest.mark.parametrize("plugins", [True, False])
def test_plugins_are_as_many_as_tensorrt_makes(
    exported: Callable[..., Path], rig: dict[str, str], capsys: Out, name: str, changes: dict[str, Any], plugins: bool
) -> None:
    bundle = exported(name, **changes)
    graphs = planned(capsys, bundle, *([] if plugins else ["--bodies"]))["graphs"]
    jobs = [{"model": str(bundle / f"{graph['graph']}.onnx")} for graph in graphs]
    told = in_rig(rig, ROOT / "tests/plugins/tensorrt/rig_child.py", plugins=plugins, jobs=jobs)
    assert len(graphs) > 1
    for graph, said in zip(graphs, told, strict=True):
        assert said["errors"] == []
        assert sum(graph["plugins"].values()) == said["plugins"], graph["graph"]
        assert bool(graph["loops"]) == (said["loops"] > 0), graph["graph"]
        ours = graph["bodies"] if not plugins else graph["plugins"]
        assert bool(ours) == graph["graph"].startswith("step_")
    assert sum(said["plugins"] for said in told) == (
        0 if not plugins else sum(sum(g["plugins"].values()) for g in graphs)
    )


@pytest.mark.parametrize("plugins", [True, False])
def test_memory_is_what_tensorrt_says(
    exported: Callable[..., Path],
    rig: dict[str, str],
    capsys: Out,
    figure: Callable[[str, float, float], None],
    plugins: bool,
) -> None:
    """The builder of TensorRT-RTX tells what its engine needs: up to 8 MiB, and so many times what we count."""
    bundle, names = exported("mdm-tiny"), ("step_joint_guided", "decode_image") if plugins else ("step_text",)
    words = [word for name in names for word in ("--graph", name)]
    graphs = planned(capsys, bundle, *words, *([] if plugins else ["--bodies"]))["graphs"]
    manifest = open_bundle(bundle).manifest
    jobs = [
        {"model": str(bundle / f"{name}.onnx"), "shapes": shapes_of(manifest, name, PROFILES["latency"])}
        for name in names
    ]
    for graph, said in zip(
        graphs, in_rig(rig, Path(__file__).with_name("rig_memory.py"), plugins=plugins, jobs=jobs), strict=True
    ):
        memory, how = graph["memory"], "plugins" if plugins else "bodies"
        figure(f"{graph['graph']}, {how}: weights off by", abs(said["weights"] / memory["weights"] - 1), 0.02)
        ours = memory["between_nodes"] + memory["workspace"]
        figure(f"{graph['graph']}, {how}: TensorRT's tensors / ours", max(0, said["activation"] - 2**23) / ours, 4)


def test_a_plan_of_the_shipped_model(exported: Callable[..., Path], capsys: Out) -> None:
    told = planned(capsys, exported("mdm-tiny"))
    manifest = json.loads((exported("mdm-tiny") / "manifest.json").read_text())
    assert [g["graph"] for g in told["graphs"]] == [n for n, g in manifest["graphs"].items() if g["role"] != "denoise"]
    assert told["findings"] == []
    by_name = {graph["graph"]: graph for graph in told["graphs"]}
    step = by_name["step_joint_guided"]
    assert step["plugins"] == {"MambaShortConv": 7, "MambaSsdScan": 7}
    assert step["nodes"] == manifest["graphs"]["step_joint_guided"]["nodes"] == sum(step["tensorrt"].values()) + 14
    operators = {n: c for n, c in manifest["graphs"]["step_joint_guided"]["operators"].items() if "." not in n}
    assert step["tensorrt"] == operators
    scan = next(one for one in step["types"] if one["operator"] == "MambaSsdScan")
    assert scan["takes"] == dict.fromkeys(("x", "dt", "Bm", "C", "z"), "float16") | dict.fromkeys(
        ("A", "D", "dt_bias"), "float32"
    )
    assert (scan["gives"], scan["nodes"]) == ("float16", 7)
    memory = step["memory"]
    assert memory["together"] == sum(memory[k] for k in ("weights", "between_nodes", "in_and_out", "workspace"))
    # batch 4, 64 picture and 20 text tokens, 16 values each
    row, tokens = 4 * 2 * 22 * 4, 4 * 84 * 16 * 4
    ins = {spec["name"] for spec in manifest["graphs"]["step_joint_guided"]["inputs"]}
    assert ins == {"base", "point", "history", "row", "noise", "guidance", "given", "uncond", "uncond_y", "y"} & ins
    assert memory["in_and_out"] > 6 * tokens + row
    assert told["weights"]["side_by_side"] == sum(graph["memory"]["weights"] for graph in told["graphs"])
    assert told["weights"]["distinct"] < told["weights"]["side_by_side"] / 7


def test_profiles_and_graphs(exported: Callable[..., Path], capsys: Out) -> None:
    """The largest of several profiles counts; memory between nodes grows with the batch alone."""
    bundle, graph = exported("mdm-tiny"), ("--graph", "step_text")
    four, sixteen, both = (
        planned(capsys, bundle, *graph, *words)["graphs"]
        for words in ((), ("--profile", "throughput"), ("--profile", "throughput", "--profile", "latency"))
    )
    assert [len(graphs) for graphs in (four, sixteen, both)] == [1, 1, 1]
    assert both == sixteen
    assert 3.9 < sixteen[0]["memory"]["between_nodes"] / four[0]["memory"]["between_nodes"] <= 4


def test_bodies(exported: Callable[..., Path], capsys: Out) -> None:
    bundle = exported("mdm-tiny")
    plugins, bodies = (
        planned(capsys, bundle, "--graph", "step_joint", *words)["graphs"][0] for words in ((), ("--bodies",))
    )
    assert (bodies["plugins"], bodies["bodies"]) == ({}, plugins["plugins"])
    assert bodies["loops"] == [2] * 7  # 84 tokens are two chunks of 64
    assert bodies["tensorrt"]["Scan"] == 7
    assert bodies["memory"]["workspace"] == 0
    assert bodies["memory"]["between_nodes"] > plugins["memory"]["between_nodes"]


@pytest.mark.parametrize("words", [(), ("--bodies", "--profile", "throughput")])
def test_what_a_person_reads(exported: Callable[..., Path], capsys: Out, words: tuple[str, ...]) -> None:
    assert main(["plan", str(exported("mdm-tiny")), *words]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "…" not in out
    assert all(said in out for said in ("step_joint_guided", "TensorRT 11.5", "Engines share no weights"))
    assert ("trtexec takes the bodies there" in out) == (not words)
    assert ("loop over chunks" in out) == bool(words)


def test_a_state_that_no_kernel_serves(exported: Callable[..., Path], capsys: Out) -> None:
    """A state of 8, in the words of mdm build; the bodies are the way out."""
    bundle = exported("mdm")
    told = planned(capsys, bundle, code=2)
    (finding,) = told["findings"]
    assert finding["message"].startswith("MambaSsdScan: no GPU kernel for N = 8\nexpected one of 16, 32, 64, 128")
    assert finding["stops"]
    assert "step_joint" in finding["graphs"]
    assert main(["plan", str(bundle)]) == 2
    out = capsys.readouterr().out
    assert "Stops a build: MambaSsdScan: no GPU kernel for N = 8" in out
    assert "--bodies" in out
    assert planned(capsys, bundle, "--bodies")["findings"] == []


def test_a_mamba_1_body_is_slow(exported: Callable[..., Path], capsys: Out) -> None:
    told = planned(capsys, exported("mdm", mixer="mamba1", state=16), "--bodies", "--graph", "step_text")
    assert told["graphs"][0]["loops"] == [23] * 3  # a turn for each of 20 tokens and 3 before them
    assert any("one after another: slow" in line for line in told["advice"])


def test_a_wrong_type_at_a_plugin(exported: Callable[..., Path], spoiled: Spoil, capsys: Out) -> None:
    def spoil(model: ModelProto) -> None:
        scan = next(node for node in model.graph.node if node.op_type == "MambaSsdScan")
        model.graph.node.insert(0, helper.make_node("Cast", [scan.input[2]], ["narrow"], to=TensorProto.FLOAT16))
        next(node for node in model.graph.node if node.op_type == "MambaSsdScan").input[2] = "narrow"

    bundle = spoiled(exported("mdm-tiny"), "step_text", spoil)
    (finding,) = planned(capsys, bundle, code=2)["findings"]
    assert finding["graphs"] == ["step_text"]
    assert finding["message"].startswith(
        "MambaSsdScan: 'A' is float16, at node 'backbone.blocks.0.mixers.0.scan'\nexpected float32"
    )
    (finding,) = planned(capsys, bundle, "--bodies", code=2)["findings"]
    assert "the body of MambaSsdScan does not take what node" in finding["message"]


def test_types_that_do_not_fit(exported: Callable[..., Path], spoiled: Spoil, capsys: Out) -> None:
    """Between nodes of TensorRT's own."""

    def spoil(model: ModelProto) -> None:
        next(node for node in model.graph.node if node.op_type == "Cast").attribute[0].i = TensorProto.INT64

    findings = planned(capsys, spoiled(exported("mdm-tiny"), "step_text", spoil), code=2)["findings"]
    assert any(finding["message"].startswith("the types do not fit together: ") for finding in findings)


def test_an_operator_that_nobody_has(exported: Callable[..., Path], spoiled: Spoil, capsys: Out) -> None:
    def spoil(model: ModelProto) -> None:
        model.opset_import.add(domain="strange", version=1)
        node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
        node.op_type, node.domain = "Mystery", "strange"

    told = planned(capsys, spoiled(exported("mdm-tiny"), "decode_text", spoil), "--graph", "decode_text", code=2)
    assert told["graphs"][0]["nobody"] == {"strange.Mystery": 1}
    stopping, noted = told["findings"]
    assert stopping["message"].startswith("operator 'strange.Mystery': TensorRT has none of this name")
    assert (noted["stops"], "sizes that only a run knows" in noted["message"]) == (False, True)


def test_a_plugin_that_no_node_names(exported: Callable[..., Path], spoiled: Spoil, capsys: Out) -> None:
    def spoil(model: ModelProto) -> None:
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "plugin_version":
                    attribute.s = b"7"

    told = planned(capsys, spoiled(exported("mdm-tiny"), "step_text", spoil), "--graph", "step_text")
    assert told["graphs"][0]["bodies"] == {"MambaShortConv": 7, "MambaSsdScan": 7}
    said = [finding["message"] for finding in told["findings"]]
    assert "7 nodes MambaSsdScan do not name our plugin, and go by their bodies" in said
    assert any("a loop is left" in one for one in said)


def test_a_strangers_graph(exported: Callable[..., Path], spoiled: Spoil, capsys: Out) -> None:
    """Names that steer a terminal, and a file that is no ONNX."""

    def spoil(model: ModelProto) -> None:
        model.graph.node[5].op_type = "\x1b[2JGone[bold]"

    bundle = spoiled(exported("mdm-tiny"), "decode_text", spoil)
    assert main(["plan", str(bundle), "--graph", "decode_text"]) == 2
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "Gone[bold]" in out
    other = bundle / "decode_text.onnx"
    size = other.stat().st_size
    other.write_bytes(b"\xff" * size)
    assert main(["plan", str(bundle), "--graph", "decode_text"]) == 2
    assert "not the file that the manifest signs" in capsys.readouterr().err


def test_a_name_that_is_no_text(exported: Callable[..., Path], spoiled: Spoil, capsys: Out) -> None:
    def spoil(model: ModelProto) -> bytes:
        return model.SerializeToString().replace(b"vae.silu.Mul", b"vae.silu.\xff\xfe\xff")

    assert main(["plan", str(spoiled(exported("mdm-tiny"), "decode_text", spoil)), "--graph", "decode_text"]) == 2
    assert "has a name that is no text" in capsys.readouterr().err


def test_a_workspace_that_the_profile_does_not_give(exported: Callable[..., Path], tmp_path: Path, capsys: Out) -> None:
    """TensorRT-RTX then finds no tactic for the plugin, and does not say why."""
    small = tmp_path / "small.json"
    small.write_text('{"workspace": 1, "batch": [1, 1, 32]}')
    bundle = exported("dim", mixer="mamba2", state=128, head=32, image_size=96, patch=4, width=32)
    words = ("--graph", "step_image", "--profile", str(small))
    (finding,) = planned(capsys, bundle, *words, code=2)["findings"]
    assert finding["message"] == (
        "the plugins want a workspace of 2097664 bytes\nthe profile gives 1048576: "
        'write a larger "workspace" in its file, or build with --bodies'
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--graph", "step_txt"), "has no graph 'step_txt'"), (("--profile", "fast"), "there is no profile 'fast'")],
)
def test_wrong_use(exported: Callable[..., Path], capsys: Out, words: tuple[str, ...], said: str) -> None:
    assert main(["plan", str(exported("mdm-tiny")), *words]) == 2
    assert said in capsys.readouterr().err


def test_without_onnx(exported: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "onnx.py").write_text("raise ModuleNotFoundError('no onnx', name='onnx')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from mdm.tools.main import main; sys.exit(main())"
    run = subprocess.run(
        [sys.executable, "-c", code, "plan", str(exported("mdm-tiny"))], capture_output=True, text=True
    )
    assert run.returncode == 3
    assert 'pip install "mdm-deploy[export]"' in run.stderr
