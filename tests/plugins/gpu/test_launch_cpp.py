"""The C++ launcher: reads the packs that pack.py writes, launches as launch.py does, and says as much when it cannot.

Built with the sanitizers: a damaged pack may not make it read or write where it should not.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

from mdm.plugins import gpu
from mdm.plugins.gpu.pack import ARCHITECTURES, PTX, Pack, architecture, compress, write

from .fake_cuda import Told, entry_of, fake_cuda, some_variant, write_some

SOURCES = Path(next(iter(gpu.__path__)))
KEY = "scaled_add float32 BLOCK=1024 warps=4 stages=1"
VALUES = ("p:0x7f0012345670", "p:0x123", "i:1064", "f:0.5")
SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@cache
def probe() -> str:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    made = Path(mkdtemp(prefix="launch_probe")) / "launch_probe"
    files = [
        Path(__file__).with_name("launch_probe.cpp"),
        *(SOURCES / name for name in ("scan.cpp", "launch.cpp", "pack.cpp")),
    ]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *SANITIZE, f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, *map(str, files), "-o", str(made), "-ldl"], check=True)
    return str(made)


def run(*words: object, given: str = "") -> subprocess.CompletedProcess[bytes]:
    # Leaks: the driver library is never closed, on purpose.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [probe(), *map(str, words)], env=environment, capture_output=True, check=False, input=given.encode()
    )


def said(*words: object) -> str:
    """The error of a run that must end with one."""
    done = run(*words)
    assert done.returncode == 1, done.stderr.decode()
    lines = done.stderr.decode()
    assert len(lines.splitlines()) <= 3, lines
    return lines


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(tmp_path, monkeypatch)


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return write_some(tmp_path / "pack", some_variant(), some_variant(kernel="other"))


def launch(
    pack: Path, *values: str, driver: str | None = None, key: str = KEY, contexts: int = 1, times: int = 1
) -> str:
    """Launch; what the launcher said of it."""
    words = ("launch", pack, driver or fake_cuda(), key, contexts, times, *(values or VALUES))
    return said(*words) if run(*words).returncode else ""


def test_a_launch(told: Told, pack: Path) -> None:
    assert launch(pack) == ""
    (load,), (get,), (attribute,), (call,) = (
        told.calls(name) for name in ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel")
    )
    assert load.split() == ["cuModuleLoadData", "scaled_add", "float32", "for", "90"]
    module, function = get.split()[1], attribute.split()[1]
    assert get == f"cuModuleGetFunction {module} scaled_add"
    assert attribute == f"cuFuncSetAttribute {function} 8 70000"
    assert call == (
        f"cuLaunchKernel {function} grid 7 2 1 block 128 1 1 shared 70000 stream 0x55 extra (nil) "
        "arguments 0x7f0012345670 0x123 1064 0.5 0 0"
    )


def test_a_second_launch_only_launches(told: Told, pack: Path) -> None:
    assert launch(pack, times=3) == ""
    names = [call.split()[0] for call in told.calls()]
    assert names[-6:] == ["cuCtxGetCurrent", "cuCtxGetId", "cuLaunchKernel"] * 2
    assert names.count("cuModuleLoadData") == 1


def test_every_context_has_its_own_function(told: Told, pack: Path) -> None:
    assert launch(pack, contexts=2, times=2) == ""
    functions = [call.split()[1] for call in told.calls("cuLaunchKernel")]
    assert functions[0] == functions[1] != functions[2] == functions[3]


CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 8), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0))


def test_the_images_are_those_that_python_reads(tmp_path: Path) -> None:
    """Byte for byte: like noise, like code, and shorter and longer than LZMA's special cases."""
    rng = random.Random(0)
    variants = [some_variant(BLOCK=size) for size in (1, 2, 5000, 300_000)]
    rows = []
    for variant in variants:
        size = variant.constants["BLOCK"]
        words = [rng.randbytes(16) for _ in range(40)]
        code = b"".join(rng.choice(words) if rng.random() < 0.9 else rng.randbytes(8) for _ in range(size // 16))
        images = dict.fromkeys((*ARCHITECTURES, PTX), (code or b"x" * size, 0)) | {
            "86": (code[::-1], 0), "90": (rng.randbytes(size), 0), "100": (b"\0" * size, 0)
        }  # fmt: skip
        entry, _ = entry_of(variant)
        stream, places = compress(images)
        rows.append((type(entry)(**{**vars(entry), "images": places, "packed": len(stream)}), stream))
    write(tmp_path / "pack", "a test", rows)
    assert_same_images(tmp_path / "pack")


def assert_same_images(path: Path) -> None:
    pack = Pack.open(path)
    expected = b""
    for key in sorted(pack.entries):
        for capability in CAPABILITIES:
            name = architecture(pack.entries[key], capability)
            image = pack.read(pack.entries[key], name)
            expected += f"{key}|{name}|{len(image)}\n".encode() + image
    done = run("images", path, *(10 * major + minor for major, minor in CAPABILITIES))
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout == expected


def test_an_old_gpu(told: Told, pack: Path) -> None:
    told(CAPABILITY="75")
    assert "scaled_add" in (error := launch(pack))
    assert "compute capability 7.5" in error


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("p:0x10",), "wrong number of arguments\nfound 1, expected 4"),
        (("i:16", *VALUES[1:]), "'x' has the wrong type\nfound i32, expected pointer"),
        ((*VALUES[:3], "i:1"), "'scale' has the wrong type\nfound i32, expected f32"),
        (("p:0", *VALUES[1:]), "'x' is null, with grid (7, 2, 1), n 1064, scale 0.500000"),
        (("p:0x1008", *VALUES[1:]), "'x' is misaligned, with grid (7, 2, 1), n 1064, scale 0.500000\n"
         "expected a multiple of 16"),
        ((*VALUES[:2], "i:-1063", "f:1"), "'n' is misaligned, with grid (7, 2, 1), n -1063, scale 1.000000\n"
         "expected a multiple of 8"),
    ],
)  # fmt: skip
def test_arguments_it_was_not_compiled_for(told: Told, pack: Path, values: tuple[str, ...], expected: str) -> None:
    assert launch(pack, *values) == f"the kernel '{KEY}' (sm_90): argument {expected}".replace(
        "argument wrong", "wrong"
    )
    assert not told.calls("cuLaunchKernel")


def test_impossible_grids(told: Told, pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("0", "0x80000000"):
        monkeypatch.setenv("PROBE_GRID_X", size)
        assert f"(sm_90): impossible grid, with grid ({int(size, 0)}, 2, 1)" in launch(pack)
    assert not told.calls("cuLaunchKernel")


def test_what_fails_is_named(told: Told, pack: Path) -> None:
    told(FAIL="cuLaunchKernel:700")
    assert launch(pack) == (
        f"the kernel '{KEY}' (sm_90) failed to launch\n"
        "cuLaunchKernel failed: CUDA_ERROR_ILLEGAL_ADDRESS (700), an illegal memory access was encountered\n"
        "with grid (7, 2, 1), n 1064, scale 0.500000"
    )
    told(CAPABILITY="130")
    for function in ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"):
        told(FAIL=f"{function}:999")
        unloaded = len(told.calls("cuModuleUnload"))
        assert launch(pack) == (
            f"the kernel '{KEY}' (PTX) cannot be loaded\n{function} failed: CUDA_ERROR_MADE_UP (999), unknown\n"
            "a newer driver may load it"
        )
        if function != "cuModuleLoadData":  # `launch` runs the probe twice where it fails
            assert len(told.calls("cuModuleUnload")) == unloaded + 2
    for function in ("cuInit", "cuCtxGetCurrent", "cuCtxGetId", "cuCtxGetDevice", "cuDeviceGetAttribute"):
        told(FAIL=f"{function}:100")
        assert launch(pack) == f"{function} failed: CUDA_ERROR_NO_DEVICE (100), as the test asked"


def test_what_is_not_there(told: Told, pack: Path, tmp_path: Path) -> None:
    assert launch(pack, driver="libnowhere.so.1").startswith(
        "no NVIDIA driver: libnowhere.so.1 cannot be loaded\nfound: "
    )
    assert "has no function cuFuncSetAttribute\n" in launch(pack, driver=fake_cuda("cuFuncSetAttribute"))
    assert "has no 'nothing'\nfound 2 entries" in launch(pack, key="nothing")
    assert "no CUDA context" in launch(pack, contexts=0)
    assert f"{tmp_path}/no cannot be read" in launch(tmp_path / "no")
    told(SHARED="69999")
    assert (
        "(sm_90) needs more shared memory than this GPU has\nfound 69999 bytes for a block, expected 70000"
        in launch(pack)
    )


def test_damaged_packs(tmp_path: Path) -> None:
    """Bytes changed, cut and added all over: an error each time, and nothing the sanitizers mind."""
    path = write_some(tmp_path / "pack")
    whole, rng = path.read_bytes(), random.Random(1)
    stream = len(whole) - entry_of(some_variant())[0].packed
    places = [*rng.sample(range(stream), 25), *rng.sample(range(stream, len(whole) - 20), 25)]
    damaged = [whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1 :] for i in places]
    damaged += [whole[: rng.randrange(len(whole))] for _ in range(10)] + [whole + b"\0", b""]
    for data in damaged:
        path.write_bytes(data)
        assert "pack" in said("images", path, *(f"{name}" for name in ARCHITECTURES), 130)
