"""The Python launcher on a fake driver: what it loads, what it launches, and what it refuses before the GPU sees it."""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest

from mdm.plugins.errors import EngineError, EnvironmentLackError, InputError
from mdm.plugins.gpu.driver import Device, Driver
from mdm.plugins.gpu.launch import Kernels
from mdm.plugins.gpu.pack import Pack

from .fake_cuda import Told, fake_cuda, some_variant, write_some

VARIANT = some_variant()
GRID = (7, 2, 1)
ARGUMENTS = [0x7F0012345670, 0x123, 1064, 0.5]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(tmp_path, monkeypatch)


@pytest.fixture
def pack(tmp_path: Path) -> Pack:
    return Pack.open(write_some(tmp_path / "pack", VARIANT, some_variant(kernel="other")))


def open_kernels(pack: Pack) -> Kernels:
    return Kernels(pack, Device(Driver(fake_cuda())))


def test_a_launch(told: Told, pack: Pack) -> None:
    kernels = open_kernels(pack)
    kernels.launch(VARIANT, GRID, ARGUMENTS, 0x55)
    (load,), (get,), (attribute,), (launch,) = (
        told.calls(name) for name in ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel")
    )
    assert load.split() == ["cuModuleLoadData", "scaled_add", "float32", "for", "90"]
    module, function = get.split()[1], attribute.split()[1]
    assert get == f"cuModuleGetFunction {module} scaled_add"
    assert attribute == f"cuFuncSetAttribute {function} 8 70000"
    assert launch == (
        f"cuLaunchKernel {function} grid 7 2 1 block 128 1 1 shared 70000 stream 0x55 extra (nil) "
        "arguments 0x7f0012345670 0x123 1064 0.5 0 0"
    )


@pytest.mark.parametrize(("capability", "image"), [("80", "80"), ("89", "89"), ("90", "90"), ("121", "ptx")])
def test_the_image_for_this_device(told: Told, pack: Pack, capability: str, image: str) -> None:
    told(CAPABILITY=capability)
    open_kernels(pack).prepare([VARIANT])
    assert [call.split()[1:5] for call in told.calls("cuModuleLoadData")] == [["scaled_add", "float32", "for", image]]


def test_after_prepare_a_launch_only_launches(told: Told, pack: Pack) -> None:
    """As a stream that is being captured wants it."""
    kernels = open_kernels(pack)
    kernels.prepare([VARIANT, some_variant(kernel="other")])
    before = len(told.calls())
    for _ in range(3):
        kernels.launch(VARIANT, GRID, ARGUMENTS, 0x55)
    later = [call.split()[0] for call in told.calls()[before:]]
    assert later == ["cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"] * 3
    functions = {call.split()[1] for call in told.calls("cuLaunchKernel")}
    assert len(functions) == 1


def test_threads_load_a_kernel_once(told: Told, pack: Pack) -> None:
    kernels = open_kernels(pack)
    threads = [Thread(target=kernels.prepare, args=([VARIANT],)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told.calls("cuModuleLoadData")) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (ARGUMENTS[:3], "wrong number of arguments\nfound 3, expected 4: x, y, n, scale"),
        ([*ARGUMENTS, 0], "found 5, expected 4"),
        ([0.0, *ARGUMENTS[1:]], "'x' has the wrong type\nfound float, expected pointer"),
        ([*ARGUMENTS[:2], True, 0.5], "'n' has the wrong type\nfound bool, expected i32"),
        ([*ARGUMENTS[:3], "a"], "'scale' has the wrong type\nfound str, expected f32"),
        ([0, *ARGUMENTS[1:]], "'x' is null, with grid .7, 2, 1., n 1064"),
        ([0x1008, *ARGUMENTS[1:]], r"'x' is misaligned, .*n 1064.*\nfound 0x1008, expected a multiple of 16"),
        ([*ARGUMENTS[:2], 1063, 0.5], r"'n' is misaligned.*\nfound 1063, expected a multiple of 8"),
        ([*ARGUMENTS[:2], 2**31, 0.5], "too large for its type\nfound grid .7, 2, 1., n 2147483648"),
        ([-16, *ARGUMENTS[1:]], "too large for its type"),
        ([*ARGUMENTS[:3], 1e39], "too large for its type"),
    ],
)
def test_arguments_it_was_not_compiled_for(told: Told, pack: Pack, arguments: list[float], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        open_kernels(pack).launch(VARIANT, GRID, arguments)
    assert "'scaled_add float32 BLOCK=1024 warps=4 stages=1' (sm_90)" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    assert not told.calls("cuLaunchKernel")


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 65536, 1), (2**31, 1, 1), (1, 1), (1, 1, -1)])
def test_impossible_grids(told: Told, pack: Pack, grid: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"scaled_add.*sm_90.*impossible grid"):
        open_kernels(pack).launch(VARIANT, grid, ARGUMENTS)
    assert not told.calls("cuLaunchKernel")


def test_a_launch_that_fails(told: Told, pack: Pack) -> None:
    kernels = open_kernels(pack)
    told(FAIL="cuLaunchKernel:700")
    with pytest.raises(EngineError) as caught:
        kernels.launch(VARIANT, GRID, ARGUMENTS)
    assert str(caught.value).splitlines() == [
        "the kernel 'scaled_add float32 BLOCK=1024 warps=4 stages=1' (sm_90) failed to launch",
        "cuLaunchKernel failed: CUDA_ERROR_ILLEGAL_ADDRESS (700), an illegal memory access was encountered",
        "with grid (7, 2, 1), n 1064, scale 0.5",
    ]
    assert told.calls()[-1] == "cuCtxPopCurrent_v2"
    told(FAIL="")
    kernels.launch(VARIANT, GRID, ARGUMENTS)


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"])
def test_a_kernel_that_does_not_load(told: Told, pack: Pack, function: str) -> None:
    told(FAIL=f"{function}:209", CAPABILITY="121")
    kernels = open_kernels(pack)
    with pytest.raises(
        EngineError, match=rf"scaled_add.*\(PTX\) cannot be loaded on Fake GPU\n{function}.*209.*\n.*12\.8"
    ):
        kernels.prepare([VARIANT])
    modules = [call.split()[1] for call in told.calls("cuModuleGetFunction")]
    assert [call.split()[1] for call in told.calls("cuModuleUnload")] == modules
    told(FAIL="")
    kernels.launch(VARIANT, GRID, ARGUMENTS)  # a failure is not remembered


def test_more_shared_memory_than_there_is(told: Told, pack: Pack) -> None:
    told(SHARED="69999")
    with pytest.raises(
        EnvironmentLackError, match=r"scaled_add.*sm_90.*\nfound 69999 bytes for a block, expected 70000"
    ):
        open_kernels(pack).prepare([VARIANT])
    assert not told.calls("cuModuleLoadData")


def test_an_old_gpu(told: Told, pack: Pack) -> None:
    told(CAPABILITY="75")
    with pytest.raises(EnvironmentLackError, match=r"scaled_add.*compute capability 7\.5"):
        open_kernels(pack).prepare([VARIANT])
