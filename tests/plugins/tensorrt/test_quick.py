"""The ahead-of-time plugins by TensorRT's own Python code, on shape expressions of a real builder: what TensorRT would
launch is what our launchers launch. No engine is built of them here: TensorRT-RTX, which the rig has, takes none."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx
import pytest

from mdm.plugins.contract import ACTIVATIONS, DOMAIN, OPERATORS, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, Operator
from mdm.plugins.errors import EngineError
from mdm.plugins.gpu.pack import PTX, SHIPPED, Entry, Pack
from mdm.plugins.gpu.scan import arguments_of
from mdm.plugins.gpu.variants import KERNELS, Launch, Variant, choose, serves, variants
from mdm.plugins.tensorrt.ptx import for_inputs, with_parameters

Ask = Callable[..., dict[str, Any]]
# The last is cut into segments elsewhere: two programs of a GPU's 132 multiprocessors.
SHAPES = ((1, 3), (2, 700), (4, 4000))
SIZES = {"D": 64, "H": 4, "P": 64, "G": 2, "N": 16, "K": 4}
KERNEL = {SSD_SCAN.name: "ssd_scan", SELECTIVE_SCAN.name: "selective_scan", SHORT_CONV.name: "short_conv"}


@pytest.fixture(scope="module")
def ask(rig: dict[str, str]) -> Ask:
    """See quick_child.py. `fails`: how the process ends."""

    def asked(fails: str = "", **request: Any) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("quick_child.py"))],
            input=json.dumps({"steps": [], "probes": [], "parse": []} | request), text=True, capture_output=True,
            env=rig, check=False,
        )  # fmt: skip
        if fails:
            assert fails in done.stderr
            return {}
        assert done.returncode == 0, done.stderr[-3000:]
        return dict(json.loads(done.stdout))

    return asked


@pytest.fixture(scope="module")
def pack() -> Pack:
    return Pack.open(SHIPPED)


def probe(operator: Operator, has: int, dtype: str, shapes: Any = SHAPES, **sizes: int) -> dict[str, Any]:
    known = SIZES | sizes
    inputs = [
        [[{"B": B, "L": L, **known}[letter] for letter in spec.dims] for B, L in shapes]
        for spec in operator.present(has)
    ]
    integers = sum(type_ == "i32" for _, type_, _ in KERNELS[KERNEL[operator.name]].arguments)
    return {"operator": operator.name, "has": has, "dtype": dtype, "inputs": inputs, "integers": integers}


def parameters(ptx: str) -> list[tuple[str, str]]:
    """Of the entry: type and name, in order."""
    (head,) = re.findall(r"\.entry \w+\(([^)]*)\)", ptx)
    return [(line.split()[1], line.split()[-1]) for line in head.split(",")]


def values_read(shipped: str, changed: str, given: list[int]) -> list[int | None]:
    """What a kernel gets of each parameter it was compiled with, when it is launched as changed with these values. All
    other lines are the same."""
    value = dict(zip((name for _, name in parameters(changed)), given, strict=True))
    read: dict[str, int] = {}
    bodies = [text[text.index(".reqntid") :].splitlines() for text in (shipped, changed)]
    assert changed.split(".entry")[0] == shipped.split(".entry")[0]
    for before, after in zip(*bodies, strict=True):
        if before != after or "_param_" in before:
            pattern = r"(\s+ld\.param\.b\d+ \s*%\w+, \[)(\w+)(\];)"
            one, other = re.fullmatch(pattern, before), re.fullmatch(pattern, after)
            assert one
            assert other
            assert (one[1], one[3]) == (other[1], other[3])
            assert read.setdefault(one[2], value[other[2]]) == value[other[2]]
    return [read.get(name) for _, name in parameters(shipped)]


def hold(told: list[dict[str, Any]], asked: dict[str, Any], pack: Pack) -> None:
    """Every launch of each tactic: as `choose` has it where it needs one launch, with what our launchers would pass."""
    operator, has, dtype = OPERATORS[asked["operator"]], asked["has"], asked["dtype"]
    names = [spec.name for spec in operator.present(has)]
    pointers = {name: 0x1000 + 0x100 * place for place, name in enumerate([*names, "y"])}
    assert len(told) == len(told[0]["tactics"])
    for width, one in zip(told[0]["tactics"], told, strict=True):
        for at, found in enumerate(one["launches"]):
            sizes = {
                letter: size
                for spec, shapes in zip(operator.present(has), asked["inputs"], strict=True)
                for letter, size in zip(spec.dims, shapes[at], strict=True)
            }
            plan = choose(operator, dtype, sizes, has, 1, (8, 0))
            (chosen,) = plan.launches
            launch = Launch(of_width(chosen.variant, width), chosen.numbers)
            entry = pack.entry(launch.variant)
            assert tuple(found[f"grid_{axis}"] for axis in "xyz") == launch.grid
            assert tuple(found[f"block_{axis}"] for axis in "xyz") == (32 * entry.warps, 1, 1)
            assert found["shared_mem"] == entry.images[PTX].shared
            assert one["name"] == entry.symbol
            given = [*(pointers[name] for name in names), *found["integers"], pointers["y"]]
            shipped = pack.read(entry, PTX).decode().rstrip("\0")
            read = values_read(shipped, one["ptx"], given)
            assert read == [*arguments_of(launch, plan, pointers), None, None]
            kinds = [".u64"] * len(names) + [".u32"] * asked["integers"] + [".u64"]
            assert [kind for kind, _ in parameters(one["ptx"])] == kinds
    assert chosen.variant.constants["W"] in told[0]["tactics"]


def of_width(variant: Variant, width: int) -> Variant:
    alike = {**variant.constants, "W": width}
    (found,) = {
        (v.warps, v.stages): v
        for v in variants()
        if (v.kernel, v.dtype, dict(v.constants)) == (variant.kernel, variant.dtype, alike)
    }.values()
    return found


@pytest.mark.parametrize("pattern", [0, 5, 10, 15])
def test_it_launches_what_our_launchers_would(pattern: int, ask: Ask, pack: Pack) -> None:
    """Smallest, usual and largest shapes, and fixed ones, of all types; each operator with some of its inputs."""
    has = {name: pattern & operator.has_all for name, operator in OPERATORS.items()}
    probes = [probe(OPERATORS[name], has[name], dtype) for name in OPERATORS for dtype in ACTIVATIONS]
    probes += [probe(OPERATORS[name], has[name], "float16", shapes=((2, 70),) * 3) for name in OPERATORS]
    told = ask(steps=[["quick", name, has[name]] for name in OPERATORS], probes=probes)
    assert told["refused"] == [""] * 3
    assert {*told["creators"].values()} == {"_TemplatePluginCreator"}
    for asked, said in zip(probes, told["probes"], strict=True):
        hold(said, asked, pack)
        widths = 2 if asked["operator"] == SSD_SCAN.name and asked["dtype"] != "float32" else 1
        assert len(said) == widths
    assert len(told["probes"]) == 12


def test_a_head_of_one_narrow_block_has_one_tactic(ask: Ask, pack: Pack) -> None:
    asked = probe(SSD_SCAN, 0, "bfloat16", P=32, N=128)
    (said,) = ask(steps=[["quick", SSD_SCAN.name, 0]], probes=[asked])["probes"]
    hold(said, asked, pack)
    assert said[0]["tactics"] == [32]


def ours() -> list[Variant]:
    return [v for v in variants() if v.kernel in KERNEL.values() and serves(v, (8, 0))]


def test_every_kernel_fits(pack: Pack) -> None:
    """48 KiB of shared memory is what a launch gets unasked; an argument that is no integer could not be passed."""
    for variant in ours():
        entry = pack.entry(variant)
        assert entry.images[PTX].shared <= 48 << 10
        assert {argument.kind for argument in entry.arguments} == {"pointer", "i32", "scratch"}


def changed(entry: Entry, pack: Pack, inputs: list[str]) -> tuple[str, list[int]]:
    """PTX for these inputs, and the sizes of its parameters."""
    text, integers = for_inputs(pack, entry, inputs)
    return text, [8] * len(inputs) + [4] * len(integers) + [8]


def offsets(sizes: list[int]) -> list[int]:
    """Where parameters of these sizes lie, each at a multiple of its own."""
    found, end = [], 0
    for size in sizes:
        found.append(-(-end // size) * size)
        end = found[-1] + size
    return found


@pytest.fixture
def tool(tmp_path: Path) -> Callable[..., str]:
    """tool(name, words...): what one of the CUDA tools that come with Triton says."""
    triton = find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("the assembler comes with Triton")
    folder = Path(triton.origin).parent / "backends/nvidia/bin"

    def run(name: str, *words: str) -> str:
        return subprocess.run([folder / name, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    return run


@pytest.mark.parametrize("architecture", ["80", "90", "120"])
@pytest.mark.parametrize("operator", [*OPERATORS.values()], ids=lambda operator: operator.torch_name)
def test_it_assembles(operator: Operator, architecture: str, pack: Pack, tool: Any, tmp_path: Path) -> None:
    """With the parameters, at the places, that a launch by pointers and 32-bit integers fills."""
    variant = next(v for v in ours() if v.kernel == KERNEL[operator.name] and v.dtype == "bfloat16")
    text, sizes = changed(pack.entry(variant), pack, [spec.name for spec in operator.present(1)])
    (tmp_path / "ptx").write_text(text)
    tool("ptxas", f"-arch=sm_{architecture}", "ptx", "-o", "cubin")
    said = tool("cuobjdump", "-elf", "cubin")
    found = re.findall(r"Ordinal\s*:\s*0x(\w+)\s+Offset\s*:\s*0x(\w+)\s+Size\s*:\s*0x(\w+)", said)
    expected = [*zip(range(len(sizes)), offsets(sizes), sizes, strict=True)]
    assert sorted(tuple(int(word, 16) for word in row) for row in found) == expected


@pytest.mark.parametrize("operator", [*OPERATORS.values()], ids=lambda operator: operator.torch_name)
def test_the_machine_code_is_the_shipped_ones(operator: Operator, pack: Pack, tool: Any, tmp_path: Path) -> None:
    """Instruction by instruction, but for where a parameter lies. With all inputs: where more are absent, the assembler
    sees that several pointers are y's."""
    variant = next(v for v in ours() if v.kernel == KERNEL[operator.name] and v.dtype == "float16")
    entry, inputs = pack.entry(variant), [spec.name for spec in operator.inputs]
    text, sizes = changed(entry, pack, inputs)
    integers = [argument.name for argument in entry.arguments if argument.kind == "i32"]
    names = [argument.name for argument in entry.arguments]
    wide = [4 if name in integers else 8 for name in names]

    def code(ptx: str, names: list[str], sizes: list[int]) -> list[str]:
        (tmp_path / "ptx").write_text(ptx)
        tool("ptxas", "-arch=sm_80", "ptx", "-o", "cubin")
        lies = {
            start + half: f"{name}+{half}".replace("states", "y")
            for name, start, size in zip(names, offsets(sizes), sizes, strict=True)
            for half in range(0, size, 4)
        }
        lines = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", tool("nvdisasm", "-c", "cubin"))
        # Parameters are from 0x160 on; the launch's own sizes lie before.
        at = r"c\[0x0\]\[0x([0-9a-f]+)\]"
        return [re.sub(at, lambda found: lies.get(int(found[1], 16) - 0x160, found[0]), line) for line in lines]

    shipped = code(pack.read(entry, PTX).decode().rstrip("\0"), names, wide)
    assert len(shipped) > 300
    assert code(text, [*inputs, *integers, "y"], sizes) == shipped


SMALL = """.version 8.0
.visible .entry scale(
	.param .u64 .ptr .global .align 1 scale_param_0,
	.param .u32 scale_param_1,
	.param .u64 scale_param_2
)
.reqntid 128
{
	ld.param.b64 	%rd1, [scale_param_0];
	ld.param.b32 	%r1, [scale_param_1];
	ret;
}
"""


def test_parameters_in_another_order() -> None:
    text = with_parameters(SMALL, "scale", ("x", "n", "unread"), ("n", "x"), {})
    assert parameters(text) == [(".u32", "scale_param_1"), (".u64", "scale_param_0")]
    assert values_read(SMALL, text, [7, 0x10]) == [0x10, 7, None]


@pytest.mark.parametrize(
    ("kernel", "given", "instead", "said"),
    [
        (("x", "n", "unread"), ("n",), {}, "reads its parameter 'x', which is not given"),
        (("x", "n"), ("n", "x"), {}, "has 3 parameters of its own order\nexpected x, n"),
        (("x", "n", "z", "more"), ("n", "x"), {}, "has 3 parameters of its own order\nexpected x, n, z, more"),
    ],
)
def test_parameters_that_are_not_so(kernel: Any, given: Any, instead: Mapping[str, str], said: str) -> None:
    with pytest.raises(EngineError, match=f"the PTX of 'scale' {said}"):
        with_parameters(SMALL, "scale", kernel, given, instead)


def test_a_parameter_read_otherwise_than_by_a_load() -> None:
    with pytest.raises(EngineError, match="reads its parameter 'x'"):
        with_parameters(SMALL.replace("[scale_param_0]", "[scale_param_0+4]"), "scale", "xnz", "nz", {"x": "z"})


def test_beside_the_full_plugins(ask: Ask) -> None:
    """TensorRT keeps the first of a name and says nothing: so the full ones come second."""
    first, other = ["quick", SHORT_CONV.name, 1], ["quick", SHORT_CONV.name, 0]
    told = ask(steps=[first, first, other, ["full"], ["full"], ["quick", SSD_SCAN.name, 7]])
    assert told["creators"] == {
        SHORT_CONV.name: "_TemplatePluginCreator", SSD_SCAN.name: "Creator", SELECTIVE_SCAN.name: "Creator",
    }  # fmt: skip
    assert told["refused"] == [
        "", "",
        f"{SHORT_CONV.name}: TensorRT has a plugin of this name already, and would keep that one\n"
        "found this one, for has = 1, expected none\nregister an ahead-of-time plugin first, in a process of its own",
        "", "",
        f"{SSD_SCAN.name}: TensorRT has a plugin of this name already, and would keep that one\n"
        "found the Python or C++ plugin, expected none\n"
        "register an ahead-of-time plugin first, in a process of its own",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "fails"),
    [
        ({"has": 4}, "MambaSsdScan: found a node with has = 4, expected 1, for which it is registered"),
        ({"shapes": "P"}, "MambaSsdScan: input 'x' has no fixed P\nexpected a network in which only B and L change"),
        ({"dtype": "A"}, "MambaSsdScan: input 'A' has the type DataType.HALF\nexpected float32 for parameters"),
        ({"N": 48}, "MambaSsdScan: no GPU kernel for N = 48\nexpected one of 16, 32, 64, 128"),
    ],
)
def test_what_it_does_not_serve(asked: dict[str, Any], fails: str, ask: Ask) -> None:
    request = probe(SSD_SCAN, asked.get("has", 1), "float16", N=asked.get("N", 16))
    if "shapes" in asked:
        request["inputs"][0][2][3] = 128
    if "dtype" in asked:
        request["halves"] = [2]
    ask(fails, steps=[["quick", SSD_SCAN.name, 1]], probes=[request])


def test_tensorrt_rtx_takes_none(ask: Ask, tmp_path: Path) -> None:
    """In its own words. The full plugins serve it."""
    x, weight, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", ["B", "L", 64]), ("weight", [64, 4]), ("y", ["B", "L", 64]))
    )
    node = onnx.helper.make_node(
        SHORT_CONV.name, ["x", "weight"], ["y"], domain=DOMAIN, has=0, plugin_namespace=DOMAIN, plugin_version="1"
    )
    graph = onnx.helper.make_graph([node], "one", [x, weight], [y])
    sets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=sets, ir_version=10), tmp_path / "model.onnx")
    parse = [str(tmp_path / "model.onnx")]
    (said,) = ask(steps=[["quick", SHORT_CONV.name, 0]], parse=parse)["parsed"]
    assert ["registered with an IPluginCreatorV3One creator only" in text for text in said] == [True]
    assert ask(steps=[["full"]], parse=parse)["parsed"] == [[]]
