"""`mdm doctor`: what is there, what is not and what to do; whatever is missing, it goes on. Machines are folders with
/proc and /sys, the NVIDIA driver is a small library that the test compiles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from mdm.plugins import library
from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.plugins.library import instruction_set
from mdm.tools import doctor, gpus
from mdm.tools.main import main

Out = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
Findings = dict[str, doctor.Finding]


def report(*section: str) -> Findings:
    """The findings by name, of some sections."""
    return {one.name: one for one in doctor.findings() if not section or one.section in section}


# --------------------------------------------------------------------------------------------- what is said, and how


def test_all_is_found_here(capsys: Out) -> None:
    assert main(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    found = {one["name"]: one for one in said["findings"]}
    assert said["backends"][0] == "ort-cpu"
    assert found["scan library"]["there"]
    assert found["scan library"]["said"].startswith(instruction_set())
    assert all(found[name]["there"] for name in ("python", "numpy", "pillow", "sentencepiece", "torch", "engine"))
    assert {"ort-cuda", "tensorrt", "tensorrt-rtx"} < {*found}
    assert said["backends"] == [name for name in doctor.BACKENDS if found[name]["there"]]


def test_lines_are_short_and_a_no_says_what_to_do() -> None:
    for one in doctor.findings():
        lines = one.said.splitlines()
        assert 1 <= len(lines) <= 3, one
        assert one.there or len(lines) > 1, one


def test_a_person_reads_sections(capsys: Out) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line in ("installed", "machine", "backends", "bundle")] == [
        "installed", "machine", "backends",
    ]  # fmt: skip
    assert "\n  yes  numpy          " in out
    assert out.splitlines()[-1].startswith("bundles run on this machine: ort-cpu")


def test_what_a_stranger_wrote_does_not_steer_the_terminal(capsys: Out) -> None:
    doctor.show(doctor.Finding("bundle", "opened", True, "\x1b[31mred\nnext"), first=True)
    assert capsys.readouterr().out == f"bundle\n  yes  opened         ?[31mred\n{'':22}next\n"


# ------------------------------------------------------------------------------------------------ what is missing


@pytest.mark.parametrize("module", ["onnxruntime", "numpy", "sentencepiece", "torch", "onnx", "PIL", "safetensors"])
def test_it_works_without(module: str) -> None:
    """In a process of its own, where an import of the module fails as where it is not installed."""
    code = f"import sys; sys.modules[{module!r}] = None; from mdm.tools.main import main; sys.exit(main(['doctor']))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    needed = module in ("onnxruntime", "numpy")
    assert run.returncode == (3 if needed else 0), run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout.splitlines()[-1].startswith("bundles run on this machine: " + ("no" if needed else "ort-cpu"))


def test_an_absent_package_says_how_to_get_it(monkeypatch: Patch) -> None:
    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", lambda name: ["numpy<3,>=1.26", 'torch<2.14,>=2.13; extra == "export"'])
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "mdm-deploy" else nothing(name))
    found = report("installed")
    assert found["numpy"].said.endswith('pip install "numpy<3,>=1.26"')
    assert found["torch"].said.endswith('pip install "mdm-deploy[export]"')


@pytest.mark.parametrize(
    ("found", "fits"), [("1.22.0", True), ("1.31.1", True), ("1.21.9", False), ("2.0.0rc1", False), ("1.22", True)]
)
def test_versions_are_held_to_what_is_asked_for(found: str, fits: bool, monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: found)
    if fits:
        assert doctor.package("onnxruntime", "<2,>=1.22") == found
        return
    with pytest.raises(EnvironmentLackError, match=r"expected <2,>=1.22\npip install \"onnxruntime<2,>=1.22\""):
        doctor.package("onnxruntime", "<2,>=1.22")


def test_two_engines_in_one_environment_are_a_fault(monkeypatch: Patch) -> None:
    both = {"onnxruntime": ["onnxruntime", "onnxruntime-gpu", "onnxruntime"]}
    monkeypatch.setattr(doctor, "packages_distributions", lambda: both)
    with pytest.raises(EnvironmentLackError, match="pip uninstall onnxruntime onnxruntime-gpu\n"):
        doctor.engine({})
    monkeypatch.setattr(doctor, "packages_distributions", dict)
    with pytest.raises(EnvironmentLackError, match=r"^none\npip install \"mdm-deploy\[cpu\]\""):
        doctor.engine({})


def test_a_lacking_library_comes_with_advice(monkeypatch: Patch) -> None:
    monkeypatch.setattr(library, "FILE", "nowhere.so")
    found = report("backends")
    assert not found["scan library"].there
    assert "install g++ or clang++" in found["scan library"].said
    assert found["ort-cpu"].there


@pytest.mark.skipif(instruction_set() != "avx512", reason="asks for less than this machine's best")
def test_lesser_instructions_are_told(monkeypatch: Patch) -> None:
    code = "from mdm.tools.doctor import scan_library; print(scan_library())"
    less = {**os.environ, "MDM_CPU_ISA": "avx2"}
    said = subprocess.run([sys.executable, "-c", code], env=less, capture_output=True, text=True, check=True).stdout
    assert said.startswith("avx2 kernels, as MDM_CPU_ISA asks; this CPU has avx512; ")


# ----------------------------------------------------------------------------------------------------------- GPUs


def test_a_driver_without_a_gpu_is_an_answer(driver: Callable[[int], None]) -> None:
    driver(100)
    found = report("machine", "backends")
    assert "cuInit says: no CUDA-capable device is detected\n" in found["gpu"].said
    assert found["ort-cuda"].said == "no GPU that works, see above\nwithout one use ort-cpu"


def test_a_gpu_alone_does_not_make_the_backend(driver: Callable[[int], None]) -> None:
    pytest.importorskip("onnxruntime")
    driver(0)
    found = report("machine", "backends")
    assert found["gpu"].there
    assert not found["ort-cuda"].there  # there is no CUDA behind the driver, whichever ONNX Runtime is installed


def test_no_driver_is_an_answer(monkeypatch: Patch) -> None:
    monkeypatch.setattr(gpus, "CUDA", "libnowhere.so.1")
    assert report("machine")["gpu"].said.startswith("no NVIDIA driver (libnowhere.so.1), so none\n")


# ------------------------------------------------------------------------------------------------------- TensorRT


def test_tensorrt_is_loaded(rig: dict[str, str]) -> None:
    code = "from mdm.tools.doctor import tensorrt_loads; print(tensorrt_loads())"
    said = subprocess.run([sys.executable, "-c", code], env=rig, capture_output=True, text=True, check=True).stdout
    assert said == "TensorRT 11.4.0.106 loads\n"


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("raise ImportError('libnvinfer.so.11: cannot open')", "libnvinfer.so.11: cannot open"),
        ("import os; os.abort()", "TensorRT ended its process"),
    ],
)
def test_a_broken_tensorrt_breaks_nothing_here(module: str, said: str, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "tensorrt.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(EnvironmentLackError) as caught:
        doctor.tensorrt_loads()
    assert said in str(caught.value)
    assert str(caught.value).endswith('pip install --force-reinstall "mdm-deploy[tensorrt]"')


@pytest.fixture
def loads(monkeypatch: Patch) -> None:
    monkeypatch.setattr("mdm.tools.engines.run.ask", lambda request, told: {"tensorrt": "11.4.0"})


@pytest.mark.usefixtures("loads")
def test_tensorrt_and_a_gpu_are_a_backend(driver: Callable[[int], None], capsys: Out, monkeypatch: Patch) -> None:
    driver(0)
    monkeypatch.setattr(doctor, "run_model", lambda backend: "runs")
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"] == ["ort-cpu", "ort-cuda", "tensorrt", "tensorrt-rtx"]


@pytest.mark.usefixtures("loads")
@pytest.mark.parametrize(("capability", "fits"), [("7.5", False), ("8.0", True), ("8.7", True), ("12.0", True)])
def test_our_kernels_want_an_ampere(capability: str, fits: bool, monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "gpus", lambda: [(f"One, compute capability {capability}, 8 GB", 8 * 10**9)])
    found = report("backends")["tensorrt"]
    assert found.there is fits
    assert found.said.startswith("TensorRT 11.4.0 loads")
    assert ("compute capability 7.5\nexpected 8.0 or newer" in found.said) is not fits


@pytest.mark.usefixtures("loads")
def test_tensorrt_without_a_gpu_is_told(driver: Callable[[int], None]) -> None:
    driver(100)
    found = report("backends")
    assert found["tensorrt"].said.startswith("no GPU that works, see above; TensorRT 11.4.0 loads\n")
    assert found["tensorrt-rtx"].said == "no GPU that works, see above\nwithout one use ort-cpu"


def test_a_gpu_without_tensorrt_says_what_to_install(driver: Callable[[int], None], monkeypatch: Patch) -> None:
    driver(0)
    missing = EnvironmentLackError('TensorRT is not installed\npip install "mdm-deploy[tensorrt]"')
    monkeypatch.setattr("mdm.tools.engines.run.ask", Mock(side_effect=missing))
    monkeypatch.setattr("mdm.runtime.rtx.find_spec", lambda name: None)
    found = report("backends")
    assert found["tensorrt"].said.endswith('pip install "mdm-deploy[tensorrt]"')
    assert 'pip install "mdm-deploy[cpu,rtx]"' in found["tensorrt-rtx"].said
    assert not found["tensorrt"].there
    assert not found["tensorrt-rtx"].there


@pytest.mark.parametrize("built", [{"step_joint", "step_joint_guided", "encode_text"}, {"encode_text"}])
def test_engines_that_were_built_are_tried(built: set[str], bundle: Path, monkeypatch: Patch) -> None:
    """For samples of the sizes that an engine is for; a graph that no task needs may be missing."""
    from mdm.runtime.bundle import open_bundle
    from mdm.runtime.ort import OrtBackend, OrtGraph

    class Built(OrtBackend):
        def lacks(self, name: str) -> str:
            return "no task needs it" if name.startswith("denoise") else ""

        def size_of(self, name: str) -> int:
            if name not in built:
                raise InputError(f"graph '{name}' has no engine\nrun: mdm build")
            return super().size_of(name)

        def load(self, name: str) -> OrtGraph:
            graph = super().load(name)
            graph.sizes = [2, 4]
            return graph

    ran = []
    run = OrtGraph.run

    def watched(graph: OrtGraph, wanted: list[str], **inputs: np.ndarray) -> list[np.ndarray]:
        ran.append((graph.name, inputs["base"].shape))
        return run(graph, wanted, **inputs)

    monkeypatch.setattr(OrtGraph, "run", watched)
    monkeypatch.setattr("mdm.runtime.backends.backend_for", lambda opened, name: Built(opened))
    monkeypatch.setattr(doctor, "gpus", lambda: [("One", 8 * 10**9)])
    opened = open_bundle(bundle)
    found = doctor.tried("bundle", "tensorrt", lambda: doctor.one_step(opened, "tensorrt"))
    needed = len([name for name in opened.manifest["graphs"] if not name.startswith("denoise")])
    if "step_joint" in built:
        assert found.said.endswith(f"; 3 of {needed} graphs are built")
        assert found.there
        assert ran == [("step_joint", (2, 72, 16))]  # 64 tokens of a picture, 8 of the shortest text
    else:
        assert not found.there
        assert "has no engine\nrun: mdm build" in found.said
        assert not ran


# ------------------------------------------------------------------------------------------------------- a bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="torch (extra export) is not installed")
    from mdm.export import export_bundle
    from mdm.reference import SHIPPED_CHECKPOINT

    out = tmp_path_factory.mktemp("doctor") / "tiny.bundle"
    return export_bundle(SHIPPED_CHECKPOINT, "mdm-tiny", out, validate=False)


def test_a_bundle_is_tried(bundle: Path, capsys: Out) -> None:
    assert main(["doctor", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "tiny, 1.1M parameters in fp32" in out
    assert "step_text makes a step in " in out
    assert out.splitlines()[-1] == f"'{bundle}' runs on this machine: ort-cpu"
    assert main(["doctor", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"] == ["ort-cpu"]


def changed(bundle: Path, folder: Path, **changes: object) -> Path:
    copy = folder / "changed.bundle"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | changes))
    return copy


def test_bfloat16_does_not_run_on_a_cpu(bundle: Path, tmp_path: Path, capsys: Out) -> None:
    path = changed(bundle, tmp_path, precision="bf16")
    assert main(["doctor", str(path)]) == 3
    out = capsys.readouterr().out
    assert "no   ort-cpu" in out
    assert "is in bfloat16, which ONNX Runtime's CPU cannot compute" in out
    assert out.splitlines()[-1] == f"'{path}' runs on this machine: no, see above"


def test_what_does_not_fit_is_not_tried(bundle: Path, capsys: Out, monkeypatch: Patch) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda: 1e6)
    assert main(["doctor", str(bundle), "--json"]) == 3
    last = json.loads(capsys.readouterr().out)["findings"][-1]
    assert last["said"].startswith("a loaded graph takes about 6 MB of 0.0 GB, so it was not tried\n")


def test_numbers_that_are_not_finite_are_a_fault(bundle: Path, monkeypatch: Patch) -> None:
    from mdm.runtime.bundle import open_bundle
    from mdm.runtime.ort import OrtGraph

    monkeypatch.setattr(OrtGraph, "run", lambda *given, **inputs: [np.array([1.0, np.nan])])
    found = doctor.tried("bundle", "ort-cpu", lambda: doctor.one_step(open_bundle(bundle), "ort-cpu"))
    assert not found.there
    assert "not finite" in found.said


def test_what_is_no_bundle_is_bad_input(tmp_path: Path, capsys: Out) -> None:
    assert main(["doctor", str(tmp_path / "nothing"), "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["exit_code"] == 2
    assert "is not a folder" in said.err


def test_without_an_engine_no_bundle_runs(bundle: Path, capsys: Out, monkeypatch: Patch) -> None:
    monkeypatch.setattr("mdm.runtime.ort.find_spec", lambda name: None)
    assert main(["doctor", str(bundle)]) == 3
    assert capsys.readouterr().out.splitlines()[-1].endswith("no, see above")
