"""`mdm plugin build`: the C++ library, where TENSORRT_ROOT says where TensorRT's headers are, and what it says without.

Headers that are not real are enough for all that goes wrong.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mdm.plugins.contract import OPERATORS
from mdm.plugins.gpu.pack import SHIPPED, Pack
from mdm.tools.main import main
from mdm.tools.plugin import library

Patch = pytest.MonkeyPatch
Out = pytest.CaptureFixture[str]
Said = Callable[..., list[str]]
needs_tools = pytest.mark.skipif(
    not shutil.which("cmake") or not (shutil.which("g++") or shutil.which("clang++")), reason="no CMake or no compiler"
)


@pytest.fixture
def said(tmp_path: Path, monkeypatch: Patch, capsys: Out) -> Said:
    """said(code, *words): the lines of `mdm plugin build`, which ends with this code and leaves what was there."""
    monkeypatch.delenv("TENSORRT_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    Path(library.FILE_NAME).write_text("the library of yesterday")
    there = {path.name for path in tmp_path.iterdir()}

    def lines(code: int, *words: str) -> list[str]:
        assert main(["plugin", "build", *words]) == code
        assert Path(library.FILE_NAME).read_text() == "the library of yesterday"
        assert {path.name for path in tmp_path.iterdir()} - {"trt"} == there
        return capsys.readouterr().err.splitlines()

    return lines


def headers(root: Path, version: str, text: str) -> None:
    (root / "include").mkdir(parents=True)
    (root / "include" / "NvInferVersion.h").write_text(version)
    (root / "include" / "NvInferRuntime.h").write_text(text)


def old_style(version: str) -> str:
    names = ("NV_TENSORRT_MAJOR", "NV_TENSORRT_MINOR", "NV_TENSORRT_PATCH")
    pairs = zip(names, version.split("."), strict=True)
    return "\n".join(f"#define {name} {number} //!< TensorRT." for name, number in pairs)


def new_style(version: str) -> str:
    names = ("MAJOR", "MINOR", "PATCH")
    pairs = list(zip(names, version.split("."), strict=True))
    lines = [f"#define TRT_{name}_ENTERPRISE {number}" for name, number in pairs]
    return "\n".join([*lines, *(f"#define NV_TENSORRT_{name} TRT_{name}_ENTERPRISE" for name, _ in pairs)])


@needs_tools
def test_it_is_built(tmp_path: Path, monkeypatch: Patch, capsys: Out) -> None:
    """Over an older one, without a warning, with all of our kernels within; whoever runs engines may load it."""
    if "TENSORRT_ROOT" not in os.environ:
        pytest.skip("no headers of TensorRT: TENSORRT_ROOT is not set")
    monkeypatch.setenv("CXXFLAGS", "-Werror")
    out = tmp_path / "plugins.so"
    out.write_text("the library of yesterday")
    assert main(["plugin", "build", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(out)
    assert told["bytes"] == out.stat().st_size < 4e6
    assert told["plugins"] == [*OPERATORS]
    assert told["headers"].startswith(f"{told['serves']}.")
    assert {*told["kernels"]} == {entry.kernel for entry in Pack.open(SHIPPED).entries.values()}
    assert {"80", "90", "120", "ptx"} <= {*told["images"]}
    assert SHIPPED.read_bytes() in out.read_bytes()
    assert out.stat().st_mode & 0o444 == 0o444 & ~current_umask()
    assert [*tmp_path.iterdir()] == [out]


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@needs_tools
@pytest.mark.parametrize("variable", [True, False])
def test_without_headers(variable: bool, said: Said, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "trt").mkdir()
    if variable:
        monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path / "trt"))
    first, second, third = said(3, *([] if variable else ["--tensorrt", "trt"]))
    assert first == "Error: TensorRT's headers are not here"
    assert second == f"found no NvInferRuntime.h in include of {tmp_path / 'trt'}"
    assert third.startswith("set TENSORRT_ROOT to an unpacked TensorRT 10.3 or newer")


@needs_tools
@pytest.mark.parametrize(
    ("text", "version"),
    [(old_style("10.2.9"), "10.2.9"), (new_style("9.9.0"), "9.9.0"), ("#define SOMETHING_ELSE 11", "")],
)
def test_old_headers(text: str, version: str, said: Said, tmp_path: Path) -> None:
    headers(tmp_path / "trt", text, "#error not reached")
    first, second, _ = said(3, "--tensorrt", str(tmp_path / "trt"))
    assert first == "Error: TensorRT's headers are too old"
    assert second == f'found version "{version}" in {tmp_path / "trt" / "include"}, expected 10.3 or newer'


@needs_tools
@pytest.mark.parametrize(("style", "version"), [(old_style, "10.3.0"), (new_style, "12.0.5")])
def test_what_does_not_compile(style: Callable[[str], str], version: str, said: Said, tmp_path: Path) -> None:
    """The version is read from both kinds of header, and the compiler's first error is told."""
    headers(tmp_path / "trt", style(version), "#error of a header that is broken\n")
    first, second, third = said(4, "--tensorrt", str(tmp_path / "trt"))
    assert first == (
        f"Error: the plugins do not compile with the headers of TensorRT {version} in {tmp_path / 'trt' / 'include'}"
    )
    assert second.startswith(f"{tmp_path / 'trt' / 'include' / 'NvInferRuntime.h'}:1:")
    assert "error: " in second
    assert third == "another compiler can be named in the variable CXX"


@needs_tools
def test_what_cmake_says_itself(said: Said, monkeypatch: Patch) -> None:
    monkeypatch.setenv("CXX", "cat")
    first, second = said(3)
    assert first == "Error: CMake cannot prepare the build of the plugins"
    assert "is not able to compile a simple test program" in second


def test_without_tools(said: Said, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert said(3)[1] == "found no no-such-compiler, looked for in the variable CXX"
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said(3)[1] == "found no c++ or g++ or clang++, looked for on the PATH"
    monkeypatch.setattr(library.shutil, "which", lambda name: None if name == "cmake" else name)
    assert said(3) == [
        "Error: CMake is needed to build the plugins",
        "found no cmake on the PATH, expected 3.20 or newer",
        "install it: pip install cmake",
    ]


@pytest.mark.parametrize("out", ["trt", "nowhere/plugins.so"])
def test_where_it_cannot_be_written(out: str, said: Said, tmp_path: Path) -> None:
    """Said before anything is compiled."""
    (tmp_path / "trt").mkdir()
    assert said(2, "--out", out)[0] == f"Error: {out} cannot be written"


def test_a_linkers_complaint_is_found() -> None:
    said = (
        "g++ -o x\n/usr/bin/ld: x.o: undefined reference to `y'\ncollect2: error: ld returned 1\ngmake: *** Error 2\n"
    )
    assert library.complaint(said) == "/usr/bin/ld: x.o: undefined reference to `y'"
    assert library.complaint("g++ -o x\ngmake: *** no rule\n\n") == "gmake: *** no rule"
