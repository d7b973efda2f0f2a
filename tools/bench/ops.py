"""`mdm bench ops`: every form of our operators on one grid of sizes, in one run.

All forms compute the whole operator of a Mamba block (a scan with softplus, bias, D skip and gate; the convolution with
bias and silu) on the same inputs:

    native        our library in an ONNX Runtime session
    body          the function body: for Mamba-1 an ONNX Scan over tokens, for Mamba-2 one over chunks of 64
    scan          Mamba-2's function body with chunks of one token: an ONNX Scan over tokens
    linear        com.microsoft::LinearAttention, Mamba-2 only
    conv          ONNX Runtime's Conv between two Transpose, then Sigmoid and Mul: the short convolution only
    torch         the reference, chunked, eager
    naive, compiled    the reference token by token, and chunked under torch.compile: only at batch 1 and width 1024

Each form is timed alone, since the threads of an idle ONNX Runtime session go on spinning; median of its runs.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import click

from mdm.plugins.contract import SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, Operator
from mdm.tools.options import json_option, print_json, progress_bar

HAS = 7  # D, z and bias: what every block has
HEAD = 64
AIMS = {  # the least that native should be faster than, on the median over the grid
    SSD_SCAN.torch_name: {"linear": 2.5, "torch": 9.0},
    SELECTIVE_SCAN.torch_name: {"body": 15.0, "torch": 12.0},
    SHORT_CONV.torch_name: {"conv": 2.0},
}
OPERATOR_OF_STATE = {4: SHORT_CONV, 16: SELECTIVE_SCAN, 64: SSD_SCAN, 128: SSD_SCAN}  # a convolution's are its taps


@dataclass(frozen=True)
class Point:
    """One place of the grid."""

    batch: int
    length: int
    width: int
    state: int
    threads: int

    @property
    def operator(self) -> Operator:
        return OPERATOR_OF_STATE[self.state]

    @property
    def sizes(self) -> dict[str, int]:
        heads = self.width // HEAD
        return {
            "B": self.batch, "L": self.length, "D": self.width, "H": heads, "P": HEAD, "N": self.state, "G": 1,
            "K": self.state,
        }  # fmt: skip

    @property
    def multiply_adds(self) -> float:
        """What the definition itself needs: for Mamba-2 into and out of each state, for Mamba-1 also its decay."""
        states = float(self.batch * self.length * self.width * self.state)
        return states * {SHORT_CONV.name: 1, SSD_SCAN.name: 2, SELECTIVE_SCAN.name: 3}[self.operator.name]


@dataclass(frozen=True)
class Row:
    """What was measured at a point: milliseconds and megabytes of each form."""

    operator: str
    point: Point
    share_of_peak: float  # of the machine's multiply-adds, by the native form
    milliseconds: Mapping[str, float]
    megabytes: Mapping[str, float]

    def ratio(self, form: str) -> float | None:
        """How many times faster native is."""
        return self.milliseconds[form] / self.milliseconds["native"] if form in self.milliseconds else None


@click.command("ops")
@click.option("--batch", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--length", type=int, multiple=True, default=(274, 1064, 4160), show_default=True)
@click.option("--width", type=int, multiple=True, default=(1024, 2048, 3072), show_default=True, help="Inner width.")
@click.option(
    "--state", type=click.Choice([*map(str, OPERATOR_OF_STATE)]), multiple=True, default=("4", "16", "64", "128"),
    show_default=True, help="16: Mamba-1; 64, 128: Mamba-2; 4: the short convolution, whose state is its taps.",
)  # fmt: skip
@click.option("--threads", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--seconds", type=float, default=0.3, show_default=True, help="Least time spent on a form at a point.")
@json_option
def command(
    batch: tuple[int, ...],
    length: tuple[int, ...],
    width: tuple[int, ...],
    state: tuple[str, ...],
    threads: tuple[int, ...],
    seconds: float,
    as_json: bool,
) -> None:
    """Time our operators in all their forms, as ratios to the native library."""
    from mdm.plugins.errors import InputError
    from mdm.plugins.library import instruction_set

    if any(w % HEAD or w < HEAD for w in width):
        raise InputError(f"--width is {', '.join(map(str, width))}, expected multiples of {HEAD}")
    if min(*batch, *length, *threads, 1) < 1:
        raise InputError("--batch, --length and --threads are at least 1")
    points = [Point(b, l, w, int(n), t) for n, w, l, b, t in itertools.product(state, width, length, batch, threads)]
    used = instruction_set()
    rows = []
    with progress_bar(as_json) as bar:
        task = bar.add_task("ops", total=len(points), note="")
        for point in points:
            rows.append(measure(point, seconds))
            bar.update(task, advance=1, note=f"{rows[-1].operator} {asdict(point)}")
    if as_json:
        print_json({"instruction_set": used, "rows": [asdict(row) for row in rows], "medians": medians(rows)})
        return
    click.echo(f"kernels: {used}. Milliseconds of native, then how many times slower the others are; MB on top.")
    for line in table(rows):
        click.echo(line)


def measure(point: Point, seconds: float) -> Row:
    from mdm.tools.bench.clock import median_time, memory_peak, multiply_add_peak

    milliseconds, megabytes = {}, {}
    for name, call in forms(point):
        peak = memory_peak(call)  # also warms up
        milliseconds[name] = 1000 * median_time(call, seconds)
        if peak is not None:
            megabytes[name] = peak / 2**20
    rate = point.multiply_adds / (milliseconds["native"] / 1000)
    share = rate / multiply_add_peak(point.threads)
    return Row(point.operator.torch_name, point, share, milliseconds, megabytes)


def forms(point: Point) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each form as a call, made when its turn comes and dropped after it."""
    import torch

    from mdm.plugins.functions import operator_model
    from mdm.plugins.linear_attention import use_linear_attention
    from mdm.reference.scan import selective_scan, ssd_scan
    from mdm.reference.short_conv import short_conv
    from mdm.tools.bench.operator_inputs import operator_inputs

    operator, has = point.operator, point.operator.has_all & HAS
    inputs = operator_inputs(operator, point.sizes, has)
    shapes = {spec.name: list(inputs[spec.name].shape) for spec in operator.present(has)}
    model = operator_model(operator, has)
    yield "native", session_call(model, inputs, point.threads, native=True)
    yield "body", session_call(model, inputs, point.threads)
    if operator is SSD_SCAN:
        yield "linear", session_call(use_linear_attention(fixed(model, shapes)), inputs, point.threads)
        if point.batch == 1 and point.width == 1024:
            yield "scan", session_call(operator_model(operator, HAS, chunk_size=1), inputs, point.threads)
    if operator is SHORT_CONV:
        yield "conv", session_call(between_transposes(model, shapes), inputs, point.threads)
    torch.set_num_threads(point.threads)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    functions: dict[str, Callable[..., torch.Tensor]] = {
        SSD_SCAN.name: ssd_scan, SELECTIVE_SCAN.name: selective_scan, SHORT_CONV.name: short_conv,
    }  # fmt: skip
    function = functions[operator.name]

    def run(function: Callable[..., torch.Tensor], **how: Any) -> torch.Tensor:
        with torch.no_grad():
            return function(**tensors, **how)

    yield "torch", partial(run, function)
    if point.batch == 1 and point.width == 1024:
        if operator is not SHORT_CONV:
            yield "naive", partial(run, function, naive=True)
        yield "compiled", partial(run, torch.compile(function, dynamic=False))


def session_call(model: Any, inputs: Any, threads: int, native: bool = False) -> Callable[[], object]:
    import onnxruntime

    from mdm.plugins import register

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False  # so that the peak is what a run needs, not what the arena kept
    if native:
        register(options)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, inputs)


def fixed(model: Any, shapes: Mapping[str, list[int]]) -> Any:
    """A copy of the model whose inputs have these shapes: LinearAttention wants its head counts as numbers."""
    from onnx import ModelProto

    copy = ModelProto()
    copy.CopyFrom(model)
    for info in copy.graph.input:
        for dim, size in zip(info.type.tensor_type.shape.dim, shapes[info.name], strict=True):
            dim.dim_value = size
    return copy


def between_transposes(model: Any, shapes: Mapping[str, list[int]]) -> Any:
    """The short convolution by ONNX Runtime's Conv, which wants channels first and their number as an attribute."""
    from onnx import helper

    (channels, taps), one = shapes["weight"], helper.make_node("Constant", [], ["one"], value_ints=[1])
    copy = fixed(model, shapes)
    del copy.functions[:], copy.graph.node[:]
    turned = helper.make_node("Transpose", ["x"], ["turned"], perm=[0, 2, 1])
    weight = helper.make_node("Unsqueeze", ["weight", "one"], ["taps"])
    conv = helper.make_node("Conv", ["turned", "taps", "bias"], ["sums"], group=channels, pads=[taps - 1, 0])
    back = helper.make_node("Transpose", ["sums"], ["total"], perm=[0, 2, 1])
    gate = helper.make_node("Sigmoid", ["total"], ["gate"])
    copy.graph.node.extend([one, turned, weight, conv, back, gate, helper.make_node("Mul", ["total", "gate"], ["y"])])
    return copy


def medians(rows: list[Row]) -> dict[str, dict[str, float]]:
    """For each operator, the median over its points of how many times slower each form is than native."""
    found: dict[str, dict[str, float]] = {}
    for operator in dict.fromkeys(row.operator for row in rows):
        mine = [row for row in rows if row.operator == operator]
        names = dict.fromkeys(name for row in mine for name in row.milliseconds)
        found[operator] = {
            name: statistics.median([r for row in mine if (r := row.ratio(name)) is not None]) for name in names
        }
        found[operator]["share of peak"] = statistics.median([row.share_of_peak for row in mine])
    return found


FORMS = ("body", "scan", "linear", "conv", "torch", "naive", "compiled")


def table(rows: list[Row]) -> Iterator[str]:
    head = [
        "operator",
        "B",
        "L",
        "width",
        "N",
        "thr",
        "native ms",
        "of peak",
        *FORMS,
        "MB: native",
        "body",
        "linear",
        "conv",
        "torch",
    ]
    yield " | ".join(head)
    yield " | ".join("---" for _ in head)
    for row in rows:
        point = row.point
        ratios = [row.ratio(form) for form in FORMS]
        cells = [row.operator, *map(str, (point.batch, point.length, point.width, point.state, point.threads))]
        cells += [f"{row.milliseconds['native']:.2f}", f"{row.share_of_peak:.0%}"]
        cells += ["-" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
        cells += [
            f"{row.megabytes[f]:.1f}" if f in row.megabytes else "-"
            for f in ("native", "body", "linear", "conv", "torch")
        ]
        yield " | ".join(cells)
    for operator, found in medians(rows).items():
        parts = [f"{name} {value:.1f}" for name, value in found.items() if name in FORMS]
        yield f"median, {operator}: {', '.join(parts)}; native at {found['share of peak']:.0%} of peak"
        for form, aim in AIMS[operator].items():
            yield f"  aim: native at least {aim} times faster than {form}: {found[form]:.1f}"
