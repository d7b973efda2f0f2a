"""The C++ plugins: asked as TensorRT would, over a fake driver, and held to node.py's answers and launches.

`node_probe` asks the class with all of the logic, which needs no header of TensorRT; `plugin_probe` asks the built
library, where TENSORRT_ROOT says where TensorRT's headers are. With the rig, TensorRT's parser and builder load it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from random import Random
from tempfile import mkdtemp
from typing import Any
from unittest import mock

import onnx
import pytest

from mdm.plugins import contract, gpu
from mdm.plugins.contract import ACTIVATIONS, DOMAIN, OPERATORS, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, VERSION, Operator
from mdm.plugins.functions import operator_model
from mdm.plugins.gpu.driver import Device, Driver
from mdm.plugins.gpu.launch import Kernels
from mdm.plugins.gpu.pack import SHIPPED, Pack
from mdm.plugins.gpu.scan import Scans
from mdm.plugins.tensorrt.node import Described, Node
from mdm.tools.plugin.library import build_library

from ..gpu.fake_cuda import Told, fake_cuda
from ..gpu.test_scan import PATTERNS, launched
from .test_fitness import InRig, exported, hold, jobs, write_model

GPU = Path(next(iter(gpu.__path__)))
SOURCES = GPU.with_name("tensorrt")
HERE = Path(__file__).parent
WARNINGS = ("-Wall", "-Wextra", "-Werror")
SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
Y, WORKSPACE, STREAM = 0x20000, 0x100000, 0x55
Sizes = Mapping[str, int]
Ask = Callable[[Sequence[str]], list[str]]


def headers() -> Path:
    root = os.environ.get("TENSORRT_ROOT")
    if root is None:
        pytest.skip("no headers of TensorRT: TENSORRT_ROOT is not set")
    found = Path(root) / "include"
    assert (found / "NvInferRuntime.h").is_file(), f"TENSORRT_ROOT ({root}) has no include/NvInferRuntime.h"
    return found


def compiled(name: str, *arguments: str | Path) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    made = Path(mkdtemp(prefix=name)) / name
    source = HERE / f"{name}.cpp"
    subprocess.run([compiler, "-std=c++17", *WARNINGS, source, *arguments, "-o", made, "-ldl"], check=True)
    return made


@cache
def node_probe() -> Path:
    folder = Path(mkdtemp(prefix="contract"))
    (folder / "contract.h").write_text(contract.cpp_header())
    return compiled(
        "node_probe", *SANITIZE, f'-DMDM_KERNEL_PACK="{SHIPPED}"', f"-I{folder}", f"-I{GPU}", f"-I{SOURCES}",
        *(SOURCES / f"{name}.cpp" for name in ("node", "kernel_pack")),
        *(GPU / f"{name}.cpp" for name in ("scan", "launch", "pack")),
    )  # fmt: skip


@cache
def built() -> tuple[Path, str]:
    """As a user builds it, warnings being errors; and the version of the headers."""
    root = headers().parent
    if shutil.which("cmake") is None:
        pytest.skip("no CMake")
    made = Path(mkdtemp(prefix="mdm_tensorrt")) / "libmdm_tensorrt.so"
    with mock.patch.dict(os.environ, CXXFLAGS="-Werror"):
        return made, build_library(root, made)


def library() -> Path:
    return built()[0]


def library_for_rig() -> Path:
    made, version = built()
    if not version.startswith("11."):
        pytest.skip("the rig is TensorRT 11, and TENSORRT_ROOT is another: classes of the two are laid out otherwise")
    return made


@cache
def plugin_probe() -> Path:
    """With our stand-in for CUDA's header, so that it is tried on every machine."""
    return compiled("plugin_probe", "-isystem", headers(), "-isystem", SOURCES / "cuda_types")


@cache
def other_tensorrt(version: int) -> Path:
    return compiled("other_tensorrt", "-shared", "-fPIC", f"-DVERSION={version}")


def run(*words: str | Path, given: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    # Leaks: the driver library is never closed, on purpose.
    environment = os.environ | {"LD_LIBRARY_PATH": str(Path(fake_cuda()).parent), "ASAN_OPTIONS": "detect_leaks=0"}
    environment |= variables
    return subprocess.run(
        [*map(str, words)], input=given, text=True, capture_output=True, env=environment, check=False
    )  # fmt: skip


@pytest.fixture(params=["class", "library"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Answers to questions.h's questions, from one process."""
    words = [node_probe()] if request.param == "class" else [plugin_probe(), "questions", library()]

    def answers(questions: Sequence[str]) -> list[str]:
        done = run(*words, given="\n".join(questions) + "\n")
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.splitlines()

    return answers


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told(tmp_path, monkeypatch)
    told(ARGUMENTS=PATTERNS)
    return told


class Twin:
    """Python's answers."""

    def __init__(self) -> None:
        self.scans = Scans(Kernels(Pack.open(SHIPPED), Device(Driver(fake_cuda()))))
        self.rooms: list[int] = []  # what the prepared plans take of the workspace

    def __call__(self, questions: Sequence[str]) -> list[str]:
        return [self.answer(*question.split()) for question in questions]

    def answer(self, question: str, *words: str) -> str:
        try:
            if question == "node":
                self.node = Node(OPERATORS[words[0]], int(words[1]), lambda: self.scans)
            elif question == "takes":
                place, *tensors = words
                return "yes" if self.node.takes(int(place), [described(tensor) for tensor in tensors]) else "no"
            else:
                inputs = [described(word) for word in words]
                if question == "check":
                    self.node.check(inputs)
                if question == "workspace":
                    return str(self.node.workspace(inputs))
                if question == "prepare":
                    self.rooms.append(self.node.prepare(inputs).places[""])
                if question == "run":
                    self.node.run(inputs, [0x2000 + 0x1000 * i for i in range(len(inputs))], Y, WORKSPACE, STREAM)
        except ValueError as error:
            return str(error).replace("\n", "|")
        return "ok"


def described(tensor: str) -> Described:
    dtype, _, dims = tensor.removeprefix("~").partition(":")
    return Described(tuple(map(int, filter(None, dims.split(",")))), dtype, not tensor.startswith("~"))


def tensors(operator: Operator, sizes: Sizes, has: int, dtype: str) -> str:
    return " ".join(
        f"{dtype if spec.activation else 'float32'}:{','.join(str(sizes[letter]) for letter in spec.dims)}"
        for spec in operator.present(has)
    )


# A profile's smallest, usual and largest shapes; on the fake's 132 multiprocessors some are cut into segments.
SSD = {"H": 16, "P": 64, "G": 1, "N": 128}
SELECTIVE = {"D": 1024, "G": 2, "N": 16}
PROFILES = [
    (SSD_SCAN, 7, "bfloat16", [SSD | {"B": B, "L": L} for B, L in ((1, 64), (1, 4000), (16, 1064))]),
    (SSD_SCAN, 8, "float32", [SSD | {"B": B, "L": L, "N": 64} for B, L in ((1, 1), (1, 700), (2, 4494))]),
    (SELECTIVE_SCAN, 15, "float16", [SELECTIVE | {"B": B, "L": L} for B, L in ((1, 64), (1, 4494), (8, 4494))]),
    (SHORT_CONV, 1, "float16", [{"D": 2304, "K": 4, "B": B, "L": L} for B, L in ((1, 1), (1, 1064), (8, 4494))]),
    (SELECTIVE_SCAN, 0, "bfloat16", [SELECTIVE | {"B": B, "L": L} for B, L in ((1, 1), (2, 1064), (3, 1064))]),
]


@pytest.mark.parametrize(("operator", "has", "dtype", "shapes"), PROFILES)
def test_a_profile_as_in_python(
    told: Told, ask: Ask, operator: Operator, has: int, dtype: str, shapes: list[Sizes]
) -> None:
    """Smallest, usual, largest, in turn and again: the same kernels, grids and pointers, and the same workspace."""
    smallest, usual, largest = (tensors(operator, sizes, has, dtype) for sizes in shapes)
    questions = [f"node {operator.name} {has}", f"workspace {largest}", f"check {largest}"]
    for shape in (usual, smallest, largest, usual, smallest):
        questions += [f"prepare {shape}", f"run {shape}", f"run {shape}"]
    twin = Twin()
    answers = twin(questions)
    assert answers == ["ok", answers[1], *["ok"] * (len(questions) - 2)]
    assert max(twin.rooms) <= int(answers[1])
    expected = launched(told)
    told.log.unlink()
    assert ask(questions) == answers
    assert launched(told) == expected
    assert len(told.calls("cuModuleLoadData")) == len({call.split()[1] for call in told.calls("cuLaunchKernel")})


def test_a_run_only_launches(told: Told, ask: Ask) -> None:
    """Between shapes that were prepared before: nothing that a capture of the stream would not take."""
    operator, has, dtype, shapes = PROFILES[0]
    small, large, _ = (tensors(operator, sizes, has, dtype) for sizes in shapes)
    ask([f"node {operator.name} {has}", f"prepare {small}", f"prepare {large}"])
    prepared = len(told.calls())
    told.log.unlink()
    runs = [f"run {small}", f"run {large}", f"run {small}"]
    assert ask([f"node {operator.name} {has}", f"prepare {small}", f"prepare {large}", *runs])[3:] == ["ok"] * 3
    calls = [call.split()[0] for call in told.calls()[prepared:]]
    assert {*calls} == {"cuCtxGetCurrent", "cuCtxGetId", "cuLaunchKernel"}
    assert calls.count("cuLaunchKernel") == 1 + 3 + 1


def test_many_shapes(told: Told, ask: Ask) -> None:
    """More than a node keeps plans of, and another node: planned anew, and their kernels are not loaded again."""
    shapes = [tensors(SELECTIVE_SCAN, SELECTIVE | {"B": 1, "L": L}, 0, "float16") for L in range(1, 150)]
    questions = ["node MambaSelectiveScan 0", *(f"run {shape}" for shape in shapes)]
    assert {*ask([*questions, *questions])} == {"ok"}
    assert len(told.calls("cuLaunchKernel")) == 2 * len(shapes)
    assert len(told.calls("cuModuleLoadData")) == 1


def test_workspace_limits(ask: Ask) -> None:
    """Over sizes of every kind, those among them that no kernel serves."""
    random, questions = Random(3), []
    for operator in OPERATORS.values():
        questions.append(f"node {operator.name} 0")
        for _ in range(300):
            sizes = {letter: int(most ** random.random()) for letter, most in (("B", 30), ("L", 20000), ("H", 50))}
            sizes |= {"P": random.choice([32, 48, 64, 128]), "G": 1, "D": 16 * random.randint(1, 99), "K": 4}
            sizes["N"] = random.choice([1, 3, 16, 32, 48, 64, 127, 128, 129, 256])
            questions.append(f"workspace {tensors(operator, sizes, 0, random.choice(ACTIVATIONS))}")
        huge = dict.fromkeys("BLHPGDNK", 2**31 - 1)
        questions.append(f"workspace {tensors(operator, huge, 0, 'float32')}")
    expected = Twin()(questions)
    assert ask(questions) == expected
    assert len({*expected}) > 80
    assert expected.count("0") > 300 + 100  # of convolutions, and of short sequences


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("pattern", [0, 6, -1])
def test_types_and_layouts_as_in_python(ask: Ask, operator: Operator, pattern: int) -> None:
    has = pattern & operator.has_all
    questions = [f"node {operator.name} {has}"]
    for dtype in ACTIVATIONS:
        right = [dtype if spec.activation else "float32" for spec in operator.present(has)] + [dtype]
        questions += [f"takes {place} {' '.join(right)}" for place in range(len(right))]
        questions.append(f"takes 0 {' '.join(right[:-1])}")
        for place in range(len(right)):
            for other in (*ACTIVATIONS, "int32", f"~{right[place]}"):
                wrong = [*right[:place], other, *right[place + 1 :]]
                questions.append(f"takes {place} {' '.join(wrong)}")
    answers = Twin()(questions)
    assert ask(questions) == answers
    assert answers.count("yes") > 20
    assert answers.count("no") > 20


SMALL = {"B": 1, "L": 35, "D": 64, "H": 2, "P": 32, "G": 1, "N": 16, "K": 4}


def wrong_questions() -> Iterator[str]:
    for operator in OPERATORS.values():
        yield from (f"node {operator.name} {has}" for has in (16, 31, -1, 2))
        right = tensors(operator, SMALL, 1, "float16").split()
        wrong = [right[:-1]]
        for place, tensor in enumerate(right):
            for change in (f"{tensor},3", re.sub(r"\d+$", "5", tensor)):
                wrong.append([*right[:place], change, *right[place + 1 :]])
        for sizes in ({"G": 3}, {"G": 0}, {"K": 0}, {"N": 48, "K": 7}, {"P": 48, "D": 72}):
            wrong.append(tensors(operator, SMALL | sizes, 1, "float16").split())
        yield f"node {operator.name} 1"
        for question in ("check", "workspace", "prepare"):
            yield from (f"{question} {' '.join(shape)}" for shape in wrong)


def test_what_does_not_fit_is_said_in_pythons_words(told: Told, ask: Ask) -> None:
    questions = list(wrong_questions())
    expected = Twin()(questions)
    for said in ("expected a sum of", "stands for", "dimensions", "' has ", "divide", "one tap", "no GPU kernel for"):
        assert any(said in answer for answer in expected), said
    assert all(answer.count("|") <= 2 for answer in expected)
    assert ask(questions) == expected
    assert not told.calls("cuLaunchKernel")


def test_what_fails_is_said(told: Told, ask: Ask) -> None:
    """And the process goes on."""
    shape = tensors(SSD_SCAN, SMALL, 0, "float16")
    told(FAIL="cuLaunchKernel:700")
    answers = ask(["node MambaSsdScan 0", f"prepare {shape}", f"run {shape}", f"run {shape}"])
    assert answers[:2] == ["ok", "ok"]
    assert answers[2] == answers[3]
    assert re.fullmatch(
        r"the kernel 'ssd_scan float16 .*' \(sm_90\) failed to launch\|"
        r"cuLaunchKernel failed: CUDA_ERROR_ILLEGAL_ADDRESS \(700\), an illegal memory access was encountered\|"
        r"with grid \(2, 1, 1\), .*",
        answers[2],
    )
    told(FAIL="cuModuleLoadData:999")
    _, said, again = ask(["node MambaSsdScan 0", f"prepare {shape}", f"prepare {shape}"])
    assert said == again
    assert "(sm_90) cannot be loaded|cuModuleLoadData failed: CUDA_ERROR_MADE_UP (999)" in said


def test_the_library_is_alone() -> None:
    """Whoever loads it sees its two entry points, and needs nothing that is not on every Linux."""
    if (tool := shutil.which("readelf")) is None:
        pytest.skip("no readelf")
    told = run(tool, "--dyn-syms", "--dynamic", "--wide", library()).stdout
    symbols = re.findall(r"(?:GLOBAL|WEAK|UNIQUE) +\w+ +(\w+) (\S+)", told)
    assert {name for section, name in symbols if section != "UND"} == {"getCreators", "setLoggerFinder"}
    needed = re.findall(r"NEEDED.*\[(.*?)\.so", told)
    assert {*needed} <= {"libc", "libdl", "libm", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}


def test_creators() -> None:
    """Named by the contract; of the attributes they want `has`, whichever integers TensorRT's parser makes of it."""
    told = run(plugin_probe(), "creators", library()).stdout.splitlines()
    assert told == [f"{operator.name} {VERSION} {DOMAIN} has" for operator in OPERATORS.values()]

    def made(kind: str) -> str:
        return run(plugin_probe(), "attribute", library(), kind).stdout

    assert [made(kind) for kind in ("int32", "int64")] == ["has=5\n"] * 2
    assert [made(kind) for kind in ("absent", "empty", "none")] == ["has=0\n"] * 3
    assert made("float") == (
        f"{next(iter(OPERATORS))}: attribute 'has' is no integer\n"
        "found PluginFieldType 1, expected 5 (INT32) or 10 (INT64)\n"
    )


def test_another_tensorrt_gets_no_creators() -> None:
    """Whoever asks is known by itself, as a TensorRT that Python loaded, or else by what the process shows to all."""
    major = int(built()[1].partition(".")[0])
    other = 21 - major  # 10 or 11
    said = (
        f"the mdm plugins are built for TensorRT {major}, and another loads them: they are not used\n"
        f"found {other}.3, expected {major}\n"
        "build them with its headers: mdm plugin build --tensorrt DIR\n"
    )
    ask = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).creators_in(sys.argv[2].encode()))"

    def asked_by(version: int, **variables: str) -> tuple[str, str]:
        done = run(sys.executable, "-c", ask, other_tensorrt(version), library(), **variables)
        assert done.returncode == 0
        return done.stdout, done.stderr

    theirs, ours = other * 10000 + 302, major * 10000 + 1400
    assert asked_by(theirs) == ("0\n", said)
    for version in (ours, 10701, 8601):  # TensorRT-RTX's numbers begin at 1; before 10 nobody asks in this way
        assert asked_by(version) == ("3\n", "")
    shown = {"LD_PRELOAD": str(other_tensorrt(theirs))}
    assert asked_by(ours, **shown) == ("3\n", "")
    done = run(plugin_probe(), "creators", library(), **shown)
    assert (done.stdout, done.stderr) == ("", said)


@pytest.fixture
def library_in_rig(in_rig: InRig) -> InRig:
    """in_rig with the library loaded."""
    return partial(in_rig, plugins=str(library_for_rig()))


def test_tensorrt_builds_with_it(tiny: Any, library_in_rig: InRig, tmp_path: Path) -> None:
    """Every graph parses with a plugin for each of our nodes, and one is built, with three profiles."""
    model = write_model(tmp_path / "model", tiny(state=16, head=32))
    for precision in ("fp16", "fp32"):
        bundle = exported(model, tmp_path / precision, precision)
        parsed = jobs(bundle, build=False)
        hold(parsed, library_in_rig(parsed), True)
        whole = jobs(bundle, lambda graph: graph == "step_joint_guided")
        hold(whole, library_in_rig(whole), True)


def test_what_no_kernel_serves_stops_a_build(tiny: Any, library_in_rig: InRig, tmp_path: Path) -> None:
    bundle = exported(write_model(tmp_path / "model", tiny()), tmp_path / "bundle", "fp16")
    (told,) = library_in_rig(jobs(bundle, lambda name: name == "denoise_image"))
    assert told["bytes"] == 0
    assert "ERROR: MambaSsdScan: no GPU kernel for N = 8\nexpected one of 16, 32, 64, 128" in "\n".join(told["said"])


def test_a_node_that_lacks_an_input_is_not_parsed(library_in_rig: InRig, tmp_path: Path) -> None:
    model = operator_model(SSD_SCAN, 7, "float16")
    del model.functions[:]
    next(attribute for attribute in model.graph.node[0].attribute if attribute.name == "has").i = 15
    onnx.save(model, tmp_path / "model.onnx")
    (told,) = library_in_rig([{"model": str(tmp_path / "model.onnx")}])
    assert not told["parsed"]
    assert told["said"][0] == (
        "ERROR: MambaSsdScan: attribute 'has' is 15, which stands for 9 inputs\n"
        "found 8, expected x, dt, A, Bm, C, D, z, dt_bias, mask"
    )
