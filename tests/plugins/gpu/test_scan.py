"""The plan of a scan, launched on a fake driver by Python and by C++: which kernels, and which pointer goes where."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mdm.plugins.contract import ACTIVATIONS, OPERATORS, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, Operator
from mdm.plugins.errors import InputError
from mdm.plugins.gpu.driver import Device, Driver
from mdm.plugins.gpu.launch import Kernels
from mdm.plugins.gpu.pack import SHIPPED, Pack, key_of
from mdm.plugins.gpu.scan import Scans
from mdm.plugins.gpu.variants import KERNELS, SELECTIVE_STATES, SSD_STATES, choose

from .fake_cuda import Told, fake_cuda
from .test_launch_cpp import run

SSD = {"B": 2, "L": 1064, "D": 0, "H": 64, "P": 64, "G": 1, "N": 128}
CUT = SSD | {"B": 1, "L": 4000, "H": 16}
SELECTIVE = {"B": 1, "L": 4494, "D": 1024, "H": 0, "P": 0, "G": 2, "N": 16}
NAMES = ("x", "u", "dt", "delta", "A", "Bm", "C", "D", "z", "dt_bias", "delta_bias", "mask", "weight", "bias", "y")
POINTERS = {name: 0x2000 + 0x1000 * place for place, name in enumerate(NAMES)}
WORKSPACE = 0x100000
PATTERNS = " ".join(
    f"{name}={''.join('p' if type_.startswith('*') else 'i' for _, type_, _ in kernel.arguments)}"
    for name, kernel in KERNELS.items()
)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told(tmp_path, monkeypatch)
    told(ARGUMENTS=PATTERNS)
    return told


@pytest.fixture
def scans() -> Scans:
    return Scans(Kernels(Pack.open(SHIPPED), Device(Driver(fake_cuda()))))


def launched(told: Told) -> list[dict[str, str]]:
    """Every launch: its kernel, its grid, and each argument's value by name."""
    kernels = {call.split()[1]: call.split()[2] for call in told.calls("cuModuleGetFunction")}
    functions = dict(zip((c.split()[1] for c in told.calls("cuFuncSetAttribute")), kernels.values(), strict=True))
    found = []
    for call in told.calls("cuLaunchKernel"):
        words = call.split()
        kernel = functions[words[1]]
        names = [name for name, _, _ in KERNELS[kernel].arguments]
        values = words[words.index("arguments") + 1 :]
        assert words[words.index("stream") + 1] == "0x55"
        found.append({"kernel": kernel, "grid": " ".join(words[3:6]), **dict(zip(names, values, strict=True))})
    return found


def line_of(operator: Operator, dtype: str, sizes: Mapping[str, int], has: int, *gpu: int) -> str:
    scan = {SSD_SCAN.name: "ssd", SELECTIVE_SCAN.name: "selective", SHORT_CONV.name: "conv"}[operator.name]
    return " ".join(map(str, (scan, dtype, *(sizes.get(letter, 0) for letter in "BLDHPGNK"), has, *gpu)))


@pytest.mark.parametrize(
    ("operator", "sizes", "has", "kernels"),
    [
        (SSD_SCAN, SSD, 7, ["ssd_scan"]),
        (SSD_SCAN, CUT, 11, ["ssd_segment_states", "carry_states", "ssd_scan"]),
        (SELECTIVE_SCAN, SELECTIVE, 15, ["selective_segment_states", "carry_states", "selective_scan"]),
        (SELECTIVE_SCAN, SELECTIVE | {"B": 8}, 0, ["selective_scan"]),
        (SHORT_CONV, {"B": 2, "L": 1064, "D": 4352, "K": 4}, 1, ["short_conv"]),
        (SHORT_CONV, {"B": 2, "L": 35, "D": 1024, "K": 3}, 0, ["short_conv"]),
    ],
)
def test_every_pointer_goes_where_it_belongs(
    told: Told, scans: Scans, operator: Operator, sizes: dict[str, int], has: int, kernels: list[str]
) -> None:
    plan = scans.plan(operator, "bfloat16", sizes, has)
    loaded = len(told.calls("cuModuleLoadData"))
    assert loaded == len(kernels)
    scratch = {name: WORKSPACE + at for name, at in plan.places.items() if name}
    assert {*scratch} == ({"states", "step_sums"} if len(kernels) == 3 else set())
    scans.run(plan, {**POINTERS, **scratch}, 0x55)
    assert len(told.calls("cuModuleLoadData")) == loaded, "a launch loads nothing"

    calls = launched(told)
    assert [call["kernel"] for call in calls] == kernels
    there = {spec.name for spec in operator.present(has)} | {"y"}
    for call in calls:
        for name, value in call.items():
            if name in scratch:
                assert value == f"{scratch[name]:#x}"
            elif (name in POINTERS or name == "states") and name not in sizes:  # the convolution's D is a size
                assert value == f"{POINTERS[name if name in there else 'y']:#x}", name
    assert [int(call["has"]) for call in calls if "has" in call] == ([has] if len(kernels) == 1 else [has, has | 16])

    told.log.unlink()
    done = run("scan", SHIPPED, fake_cuda(), given=line_of(operator, "bfloat16", sizes, has, 132, 9, 0) + "\n")
    assert done.returncode == 0, done.stderr.decode()
    assert launched(told) == calls, "C++ launches otherwise"


def test_cpp_chooses_as_python_does() -> None:
    """Over sizes of every kind, those that no kernel serves among them."""
    rng, pack = random.Random(0), Pack.open(SHIPPED)
    lines, expected = [], []
    for _ in range(4000):
        operator = rng.choice([*OPERATORS.values()])
        groups = rng.choice([1, 1, 2, 3])
        states = SSD_STATES if operator is SSD_SCAN else SELECTIVE_STATES
        sizes = {
            "B": rng.choice([0, 1, 2, 5, 8, 70000]),
            "L": rng.choice([0, 1, 64, 300, 1064, 4494, 16384, 1 << 20, 1 << 21]),
            "D": groups * rng.choice([8, 16, 100, 512, 1024, 3072]), "H": groups * rng.choice([1, 4, 16, 64, 128]),
            "P": rng.choice([16, 32, 64, 96, 128]), "G": groups, "N": rng.choice([*states, *states, 48]),
            "K": rng.choice([2, 3, 4, 4, 5]),
        }  # fmt: skip
        dtype, has = rng.choice([*ACTIVATIONS, "float64"]), rng.choice([*range(16), 16])
        gpu = rng.choice([8, 46, 78, 132, 170, 500]), *rng.choice([(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
        lines.append(line_of(operator, dtype, sizes, has, *gpu))
        expected.append(as_told(pack, operator, dtype, sizes, has, *gpu))
    done = run("plans", SHIPPED, given="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr.decode()
    found = done.stdout.decode().splitlines()
    assert len(found) == len(expected)
    for line, ours, theirs in zip(lines, expected, found, strict=True):
        assert theirs == ours, line
    assert sum(";" in line for line in found) > 500
    assert sum("states@" in line for line in found) > 100


def as_told(pack: Pack, operator: Operator, dtype: str, sizes: Any, has: int, *gpu: int) -> str:
    """The plan as the probe prints it."""
    try:
        plan = choose(operator, dtype, sizes, has, gpu[0], (gpu[1], gpu[2]))
    except (InputError, ValueError) as error:
        return str(error).replace("\n", "|")
    inputs = [name for name in plan.pointers if name not in plan.scratch]
    places = sorted(f"{name}@{at}" for name, at in plan.places.items() if name)
    words = " ".join([*inputs, *places, str(plan.places[""])])
    for launch in plan.launches:
        numbers = " ".join(f"{name}={value}" for name, value in sorted(launch.numbers.items()))
        words += f"; {key_of(launch.variant)} ({', '.join(map(str, launch.grid))}) {numbers}"
    return words


def test_what_lacks_is_named(told: Told, scans: Scans) -> None:
    plan = scans.plan(SSD_SCAN, "float16", CUT, 2)
    with pytest.raises(InputError, match=r"'ssd_scan' lacks pointers for: z, step_sums\nfound .*x, .* expected x, dt"):
        scans.run(plan, {name: 16 for name in plan.pointers if name not in ("z", "step_sums")})
    given = dict.fromkeys(plan.pointers, 16)
    with pytest.raises(InputError, match=r"'ssd_segment_states .*sm_90.*'dt' is null, with grid .*L 4000, H 16"):
        scans.run(plan, given | {"dt": 0})
    assert not told.calls("cuLaunchKernel")


def test_nothing_to_do(told: Told, scans: Scans) -> None:
    scans.run(scans.plan(SSD_SCAN, "float16", SSD | {"L": 0}, 7), {})
    assert not told.calls("cuModuleLoadData")


def test_it_fills_a_graph(told: Told, scans: Scans) -> None:
    """Between the capture's begin and end there are launches and nothing else."""
    plan = scans.plan(SSD_SCAN, "float16", CUT, 0)
    driver = scans.kernels.device.driver
    before = len(told.calls())
    driver.begin_capture(0x55)
    scans.run(plan, dict.fromkeys(plan.pointers, 0x100), 0x55)
    driver.end_capture(0x55)
    names = [call.split()[0] for call in told.calls()[before:]]
    one = ["cuCtxPushCurrent_v2", "cuLaunchKernel", "cuCtxPopCurrent_v2"]
    assert names == [
        "cuStreamBeginCapture_v2", *one * 3, "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphDestroy"
    ]  # fmt: skip
