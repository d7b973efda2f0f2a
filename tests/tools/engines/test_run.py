"""What is found out before anything is built: a TensorRT and a GPU that are not here are planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mdm.plugins.contract import SCANS
from mdm.plugins.errors import EngineError, EnvironmentLackError, InputError
from mdm.runtime.bundle import Bundle, open_bundle
from mdm.runtime.tensorrt.facts import Options
from mdm.runtime.tensorrt.profiles import PROFILES, Profile, Span, largest_scan, shapes_of
from mdm.tools.engines import run
from mdm.tools.engines.run import build_engines, check_workspace, failure, place_here


class Gpu:
    name, capability, closed = "NVIDIA T4", (7, 5), 0

    def close(self) -> None:
        Gpu.closed += 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """machine("11.3.0", (9, 0)): of this TensorRT, and a GPU of this capability or none."""

    def make(version: str, capability: tuple[int, int] | None) -> None:
        def driver() -> None:
            if capability is None:
                raise EnvironmentLackError("no NVIDIA driver")

        monkeypatch.setattr(Gpu, "capability", capability)
        monkeypatch.setattr(Gpu, "closed", 0)
        monkeypatch.setattr(run, "ask", lambda request, told: {"tensorrt": version})
        monkeypatch.setattr(run, "Driver", driver)
        monkeypatch.setattr(run, "Device", lambda found: Gpu())

    return make


def test_the_place(machine: Any) -> None:
    machine("11.4.0", (9, 0))
    place = place_here(Options(hardware="ampere-plus", refit=True))
    assert (place["tensorrt"], place["gpu"]) == ("11.4.0", "NVIDIA T4, compute capability 9.0")
    assert Gpu.closed == 1
    machine("11.4.0", None)
    assert place_here(Options(hardware="ampere-plus"))["gpu"] == "no GPU"


def test_what_cannot_be_built_here(machine: Any) -> None:
    machine("11.3.0.99", (7, 5))
    with pytest.raises(InputError, match=r"engines of TensorRT 11.3 may lose a bias"):
        place_here(Options(refit=True))
    place_here(Options(strip=True, hardware="same-capability"))
    with pytest.raises(EnvironmentLackError, match=r"capability 7.5, expected 8.0 or newer"):
        place_here(Options(hardware="ampere-plus"))


def test_how_a_child_ended() -> None:
    lines = ["[W] x", "[E] Unable to load library: libnvinfer_lean.so.11", "[W] after it"]
    assert isinstance(failure("it builds no engine", 1, lines), EnvironmentLackError)
    crash = failure(None, -6, ["[W] x", "[E] the  reason", "[W] after it"])
    assert (type(crash), str(crash)) == (EngineError, "TensorRT ended its process (-6)\n[E] the reason")
    said = failure("it is\nso", 1, [])
    assert str(said) == "TensorRT says: it is so"
    assert len(str(failure("x" * 10000, 1, ["y" * 10000]))) < 700


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Callable[..., Bundle]:
    """exported(image_size=96, ...): a bundle of the tiny MDM or DiM so changed, made once."""
    pytest.importorskip("torch", reason="torch (extra export) is not installed")
    from safetensors.torch import save_file

    from mdm.export import export_bundle
    from mdm.reference import SHIPPED_TOKENIZER, load_config
    from mdm.reference.checkpoint import build_model

    made: dict[str, Bundle] = {}

    def export(**changes: Any) -> Bundle:
        if str(changes) not in made:
            folder, config = tmp_path_factory.mktemp("model"), tiny(**changes)
            save_file(build_model(load_config(config)).state_dict(), folder / "model.safetensors")
            (folder / "model.tokenizer.model").write_bytes(SHIPPED_TOKENIZER.read_bytes())
            checkpoint, out = folder / "model.safetensors", folder / "out.bundle"
            made[str(changes)] = open_bundle(export_bundle(checkpoint, config, out, precision="fp16", validate=False))
        return made[str(changes)]

    return export


LONG = {"family": "dim", "image_size": 96, "patch": 4, "width": 32, "state": 16}


@pytest.mark.parametrize("changes", [{"state": 16, "head": 32}, {"keep": 0.5, "pad": 2}, LONG])
def test_scans_are_as_large_as_a_graph_makes_them(exported: Callable[..., Bundle], changes: dict[str, Any]) -> None:
    """Every step and denoise graph: guided ones have both halves in a batch, and a sequence more than what it holds."""
    pytest.importorskip("onnx")
    from mdm.tools.plan.plan import read_model
    from mdm.tools.plan.tensors import infer

    manifest, names = (bundle := exported(**changes)).manifest, {operator.name for operator in SCANS}
    for profile in (PROFILES["latency"], Profile("short", Span(1, 2, 3), texts=(min(texts_of(manifest)),))):
        for graph, described in manifest["graphs"].items():
            if described["role"] in ("step", "denoise"):
                model, shapes = read_model(bundle, graph), shapes_of(manifest, graph, profile)
                tensors = infer(model, {name: three[2] for name, three in shapes.items()}).tensors
                found = {(tensors[node.input[0]].shape or ())[:2] for node in model.graph.node if node.op_type in names}
                assert max(found) == largest_scan(manifest, graph, profile), graph


def texts_of(manifest: Any) -> list[int]:
    return list(manifest["text"]["lengths"]) if manifest["text"] else [1]


def test_a_workspace_that_the_plugins_do_not_fit_in(
    exported: Callable[..., Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before any process starts; by their bodies the operators take none."""
    bundle, graphs = exported(**LONG), ["step_image", "step_image_guided"]

    def start(*_: Any) -> None:
        raise EnvironmentLackError("a process")

    monkeypatch.setattr(run, "ask", start)
    most = Profile("mine", Span(1, 1, 2), workspace=34816)  # 2 segments of each of 4 sequences, with 64 channels
    small = replace(most, workspace=34815)

    def build(*profiles: Profile, bodies: bool = False) -> None:
        list(build_engines(bundle, iter(graphs), profiles, Options(bodies=bodies), False, lambda _: None))

    with pytest.raises(InputError) as caught:
        build(small)
    assert str(caught.value) == (
        "profile 'mine' gets a workspace of 34815 bytes: too little for graph 'step_image_guided'\n"
        "expected 34816 or more: its plugins take them for 4 sequences of 734 tokens\n"
        'in the profile\'s file write "workspace": 1 (MiB) or more, or build with --bodies'
    )
    for enough in ((most,), (small, PROFILES["edge"]), (replace(small, batch=Span(1, 1, 1)),)):
        with pytest.raises(EnvironmentLackError, match="a process"):
            build(*enough)
    with pytest.raises(EnvironmentLackError, match="a process"):
        build(small, bodies=True)


def test_what_plugins_take_is_of_a_precision(exported: Callable[..., Bundle]) -> None:
    """Of 128 states: in float32 the blocks of a Mamba-2 scan are half as wide."""
    manifest = exported(**LONG).manifest
    config = manifest["config"] | {"mixer": "mamba2", "width": 2048, "head": 64, "state": 128}
    for precision, width in (("fp32", 16), ("fp16", 32), ("bf16", 32)):
        model = {**manifest, "config": config, "precision": precision}
        takes = 4 * 96 * width * 2 * 128 + 4 * 96 * 2  # two segments of 734 tokens
        check_workspace(model, "step_image", [replace(PROFILES["edge"], workspace=takes)])
        with pytest.raises(InputError, match=f"expected {takes} or more"):
            check_workspace(model, "step_image", [replace(PROFILES["edge"], workspace=takes - 1)])
    no_pad = {**manifest, "config": config | {"pad": "3"}}
    with pytest.raises(InputError, match="the model's config says pad = '3', expected a whole number of 0 or more"):
        check_workspace(no_pad, "step_image", [PROFILES["edge"]])
