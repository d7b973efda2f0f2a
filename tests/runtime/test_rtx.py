"""TensorRT-RTX as ONNX Runtime's plugin. Its real library runs in child processes, on a stand-in for CUDA that has
memory but no kernels: which GPUs it takes, what lies in their memory, and that a whole graph becomes one engine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.plugins.library import REGISTERED
from mdm.runtime import ort, rtx
from mdm.runtime.bundle import open_bundle
from mdm.runtime.ort import OrtBackend

RIG = Path(__file__).parents[1] / "rig"
Child = Callable[..., Any]
HEAD = "import json, sys\nfrom mdm.plugins.errors import MdmError\n"


@pytest.fixture(scope="session")
def fake_cudart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("cuda")
    subprocess.run([compiler, "-shared", "-fPIC", RIG / "fake_cudart.c", "-o", folder / "libcuda.so.1"], check=True)
    shutil.copy(folder / "libcuda.so.1", folder / "libnvidia-ml.so.1")
    return folder


@pytest.fixture(scope="session")
def child(rig: dict[str, str], fake_cudart: Path) -> Child:
    """child(code, "86,120"): run it where there are such GPUs -> the JSON it prints. Without any: plainly."""

    def run(code: str, gpus: str = "", *arguments: Any, driver: bool = True) -> Any:
        command = [sys.executable, "-c", HEAD + code, *map(str, arguments)]
        environment = {**rig, "FAKE_GPUS": gpus}
        if driver:
            environment["LD_LIBRARY_PATH"] = f"{fake_cudart}{os.pathsep}{rig['LD_LIBRARY_PATH']}"
            command = ["env", "LD_PRELOAD=libcuda.so.1", *command]
        if gpus:
            command = [str(RIG / "with_gpus"), *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stderr == ""  # the provider would log each of our operators as an error
        return json.loads(done.stdout)

    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/sys/class"], capture_output=True).returncode:
        pytest.skip("no mount namespace of one's own is allowed here, in which a GPU could be shown")
    return run


def refusal_of(code: str) -> str:
    return f"try:\n    {code}\nexcept MdmError as error:\n    print(json.dumps([error.exit_code, str(error)]))\n"


DEVICES = "from mdm.runtime.rtx import rtx_devices\n"


# ---------------------------------------------------------------------------------------------- the real provider


def test_without_a_driver_its_library_is_named(child: Child) -> None:
    code, said = child(DEVICES + refusal_of("rtx_devices()"), driver=False)
    assert code == 3
    assert said.startswith("TensorRT-RTX cannot be loaded: lib")
    assert ": cannot open shared object file" in said
    assert len(said.splitlines()) == 3


@pytest.mark.parametrize("gpus", ["", "75", "80,90,100"])
def test_gpus_that_it_does_not_take_are_as_none(child: Child, gpus: str) -> None:
    code, said = child(DEVICES + refusal_of("rtx_devices()"), gpus)
    assert code == 3
    assert said.startswith("TensorRT-RTX finds no GPU here that it takes: compute capability 8.6, 8.9 or 12")


def test_gpus_have_cudas_numbers(child: Child) -> None:
    ask = "from mdm.runtime.rtx import rtx_device\nbus = lambda n: rtx_device(n).device.metadata['pci_bus_id']\n"
    assert child(ask + "print(json.dumps([bus(1), bus(2), bus(1)]))", "75,86,120") == [
        "0000:02:00.0", "0000:03:00.0", "0000:02:00.0",
    ]  # fmt: skip
    code, said = child(ask + refusal_of("bus(0)"), "75,86,120")
    assert code == 2
    assert said == "TensorRT-RTX takes no GPU 0 here\nit takes number 1, 2"


def test_buffers_lie_in_its_memory(child: Child, deployed: Callable[[str], Any]) -> None:
    """Allocated, zero, copied there and back by the provider's own code; not this side's memory."""
    code = (
        "from mdm.runtime.bundle import open_bundle\nfrom mdm.runtime.ort import OrtBackend\n"
        "engine = OrtBackend(open_bundle(sys.argv[1]), 'tensorrt-rtx', device=1)\n"
        "buffer = engine.buffer((4, 3), 'float16')\n"
        "found = [float(abs(buffer.value.numpy()).sum())]\n"
        "buffer.host[...] = 7\nfound.append(float(buffer.value.numpy().sum()))\n"
        "buffer.push()\nbuffer.host[...] = 0\nbuffer.pull()\nfound.append(float(buffer.host.sum()))\n"
        "found += [buffer.address(1) - buffer.address(0), buffer.address(0) == buffer.host.ctypes.data]\n"
        "print(json.dumps(found))"
    )
    assert child(code, "86,89", deployed("keep").bundle) == [0, 0, 84, 6, False]


# Stops where an engine would be put on the GPU, and leaves what was made.
COMPILE = """
import onnxruntime
from mdm.runtime.bundle import open_bundle
from mdm.runtime.ort import OrtBackend

class Options(onnxruntime.SessionOptions):
    def add_provider_for_devices(self, devices, options):
        super().add_provider_for_devices(devices, options | {"nv_target_sm": "sm86"})
        settings = {"ep.context_enable": 1, "ep.context_embed_mode": 1, "session.compile_only": 1}
        for name, value in {**settings, "ep.context_file_path": sys.argv[2]}.items():
            self.add_session_config_entry(name, str(value))

onnxruntime.SessionOptions = Options
engine = OrtBackend(open_bundle(sys.argv[1]), "tensorrt-rtx")
try:
    engine.graph(sys.argv[3])
except MdmError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize(
    ("bundle", "graph"),
    [("keep", "step_joint_guided"), ("keep", "step_text"), ("keep", "decode_image"), ("dim", "step_image_guided")],
)
def test_a_graph_is_one_engine(
    child: Child, deployed: Callable[[str], Any], tmp_path: Path, bundle: str, graph: str
) -> None:
    """Both operators' bodies with their loops too; what it does not take would be other nodes beside."""
    onnx = pytest.importorskip("onnx")
    made = tmp_path / "made.onnx"
    said = child(COMPILE, "86", deployed(bundle).bundle, made, graph)
    assert "Session has not been initialized" in said
    assert [node.op_type for node in onnx.load(made).graph.node] == ["EPContext"]


# -------------------------------------------------------------------------------------------------- with stand-ins


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The CPU in the provider's place -> what each session is for."""
    asked: list[tuple[Any, ...]] = []

    def use(options: Any, number: int, shapes: Any) -> None:
        asked.append((number, shapes))
        options.add_provider("CPUExecutionProvider", {})

    monkeypatch.setattr(ort, "use_rtx", use)
    monkeypatch.setattr(ort, "rtx_device", lambda number: None)
    monkeypatch.setitem(ort.PROVIDERS, "tensorrt-rtx", ("CPUExecutionProvider", "cpu"))
    return asked


def test_engines_are_for_the_shapes_that_a_model_has(
    plugged: list[tuple[Any, ...]], deployed: Callable[[str], Any]
) -> None:
    bundle = open_bundle(deployed("keep").bundle)
    engine = OrtBackend(bundle, "tensorrt-rtx", threads=1, device=3)
    graph = engine.graph("step_joint")
    [(number, shapes)] = plugged
    assert number == 3
    assert shapes["base"] == ((1, 24, 12), (8, 36, 12), (16, 36, 12))  # texts of 8 and of 20 tokens, and a picture's 16
    assert set(shapes) == set(graph.inputs)
    assert [*graph.batches(0)] == [*range(1, 17)]
    assert not [*OrtBackend(bundle, threads=1).graph("step_joint").batches(0)]  # the others take any


def test_the_options_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Options:
        log_severity_level = 2

        def __init__(self) -> None:
            self.entries: dict[str, str] = {}
            self.added: tuple[Any, ...] = ()

        def add_provider_for_devices(self, *added: Any) -> None:
            self.added = added

        def add_session_config_entry(self, name: str, value: str) -> None:
            self.entries[name] = value

    monkeypatch.setattr(rtx, "rtx_device", lambda number: f"GPU {number}")
    options: Any = Options()
    rtx.use_rtx(options, 2, {"x": ((1, 4), (2, 4), (8, 4)), "row": ((1,), (2,), (8,))})
    assert options.added == (
        ["GPU 2"],
        {
            "nv_profile_min_shapes": "x:1x4,row:1", "nv_profile_opt_shapes": "x:2x4,row:2",
            "nv_profile_max_shapes": "x:8x4,row:8",
        },
    )  # fmt: skip
    assert options.entries == {"session.disable_cpu_ep_fallback": "1"}
    rtx.use_rtx(options, 0)
    assert options.added == (["GPU 0"], {})


@pytest.mark.usefixtures("plugged")
def test_our_library_stays_out(deployed: Callable[[str], Any]) -> None:
    """With a kernel of the CPU's for a node, the provider takes nothing of the graph; CUDA's takes the rest."""
    bundle = open_bundle(deployed("dim").bundle)
    for name, native in (("tensorrt-rtx", False), ("ort-cpu", True)):
        engine = OrtBackend(bundle, name, threads=1)
        engine.device = "cuda"
        options = engine.options(bundle.graph("step_image")["operators"])
        try:
            found = bool(options.get_session_config_entry(REGISTERED))
        except RuntimeError:
            found = False
        assert found is native


def test_a_limit_of_memory_is_refused(deployed: Callable[[str], Any]) -> None:
    with pytest.raises(InputError, match="'tensorrt-rtx' cannot hold to a limit of memory\n"):
        OrtBackend(open_bundle(deployed("keep").bundle), "tensorrt-rtx", memory=10**9)


def test_a_missing_package_is_named(deployed: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentLackError, match=r'is missing\npip install "mdm-deploy\[cpu,rtx\]"') as caught:
        OrtBackend(open_bundle(deployed("keep").bundle), "tensorrt-rtx")
    assert "onnxruntime_ep_nv_tensorrt_rtx" in str(caught.value)


@pytest.mark.parametrize(("version", "old"), [("1.24.4", True), ("1.25.0", False), ("1.100.1", False), ("2.0", False)])
def test_an_onnx_runtime_without_its_memory_is_too_old(
    version: str, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rtx, "find_spec", lambda name: True)
    monkeypatch.setattr(onnxruntime, "__version__", version)
    monkeypatch.setattr(rtx, "register_provider", lambda: None)
    with pytest.raises(EnvironmentLackError, match=f"found {version}" if old else "finds no GPU") as caught:
        rtx.rtx_devices()
    assert ("1.25 or newer" in str(caught.value)) is old


def test_a_session_never_goes_on_with_the_cpu(
    deployed: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime's own fallback would, and print that into what a program reads."""
    engine = OrtBackend(open_bundle(deployed("keep").bundle), threads=1)
    monkeypatch.setattr(engine, "provider_options", lambda: ("CPUExecutionProvider", {"no such option": np.nan}))
    made: list[int] = []

    def fail(self: Any, *arguments: Any) -> None:
        made.append(1)
        raise RuntimeError("its device is gone")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fail)
    with pytest.raises(EnvironmentLackError, match="its device is gone"):
        engine.graph("step_text")
    assert made == [1]
    assert capsys.readouterr().out == ""
