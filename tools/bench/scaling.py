"""`mdm bench scaling`: the headline of both papers, time per step against latent tokens, Mamba against attention.

A step is one run of a step graph, the sampler's arithmetic in it: unguided, random weights, pictures of growing size.
The transformer (`transformer.py`) is built and run the same way, and its blocks hold as many parameters. There are half
as many of them, because a customary transformer block weighs twice as much as a Mamba block ("the standard Mamba has
twice as many blocks as the transformer", DiM 4.2); its MLPs then come out about four times as wide as its stream.

Both models are loaded beside each other with the session settings of the runtime, and their steps take turns; the
median counts. Time per step is about blocks x time per block, so a shallow model's exponents and crossover are those of
a deep one. Memory is what loading and a first step take at most on top of what was there before, weights included.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mdm.plugins.errors import InputError
from mdm.tools.options import FILE, json_option, print_json, progress_bar

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from mdm.export.graphs import Built
    from mdm.export.weights import Checkpoint, Weights
    from mdm.reference.config import Config

TOKENS = (256, 512, 1024, 2048, 4096, 8192, 16384)
MAMBA, TRANSFORMER = "Mamba", "transformer"
FITTED = 4  # points at the long end, on which exponents are fitted
Call = Callable[[], object]


@dataclass(frozen=True)
class Point:
    """What was measured at one length, by model."""

    tokens: int
    milliseconds: Mapping[str, float]
    megabytes: Mapping[str, float]  # empty where the system does not say

    @property
    def ratio(self) -> float:
        """How many times faster Mamba is."""
        return self.milliseconds[TRANSFORMER] / self.milliseconds[MAMBA]


@dataclass(frozen=True)
class Model:
    """A kind of model: its graph for each picture side, and the parameters of its blocks."""

    name: str
    blocks: int
    parameters: int
    graphs: Mapping[int, bytes]
    folder: Path  # where its weights lie


@click.command("scaling")
@click.option(
    "--family", type=click.Choice(["mdm", "dim"]), default="mdm", show_default=True, help="mdm: Mamba-2, dim: Mamba-1."
)
@click.option(
    "--tokens", type=click.IntRange(min=1), multiple=True, default=TOKENS, show_default=True,
    help="Latent tokens; pictures are square, so the nearest square is taken.",
)  # fmt: skip
@click.option("--width", type=click.IntRange(min=1), default=512, show_default=True, help="A multiple of 64.")
@click.option("--blocks", type=click.IntRange(min=1), default=5, show_default=True, help="Of the Mamba; odd.")
@click.option("--transformer-blocks", type=click.IntRange(min=1), help="Default: half of --blocks, rounded up.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Default: one a core.")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Least time on a model at a length.")
@click.option("--plot", type=FILE, help="Write a picture of it, FILE.png.")
@json_option
def command(
    family: str,
    tokens: tuple[int, ...],
    width: int,
    blocks: int,
    transformer_blocks: int | None,
    batch: int,
    threads: int | None,
    seconds: float,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Time per step against latent tokens: Mamba and a transformer of equal weight."""
    from mdm.plugins import cpu_library_path
    from mdm.tools.bench.transformer import HEAD

    cpu_library_path()  # without it the scans' bodies would be timed, which says nothing of Mamba
    sides = sorted({round(math.sqrt(count)) for count in tokens})
    if len(sides) < 2:
        raise InputError(f"--tokens is {', '.join(map(str, tokens))}: a line takes two lengths or more")
    if width % HEAD:
        raise InputError(f"--width is {width}, expected a multiple of {HEAD}")
    if plot is not None and (plot.suffix != ".png" or not plot.parent.is_dir()):
        raise InputError(f"--plot is '{plot}', expected a file name that ends in .png, in a folder that exists")
    points = []
    with tempfile.TemporaryDirectory() as folder, progress_bar(as_json) as bar:
        task = bar.add_task("scaling", total=len(sides), note="")
        mamba = mamba_model(Path(folder) / MAMBA, family, width, blocks, sides)
        half = (blocks + 1) // 2 if transformer_blocks is None else transformer_blocks
        other = transformer_model(Path(folder) / TRANSFORMER, width, half, mamba.parameters, sides)
        for side in sides:
            points.append(measure((mamba, other), side, batch, threads, seconds))
            bar.update(task, advance=1, note=f"{side**2} tokens: {points[-1].ratio:.2f}")
    slopes = {name: exponent(points[-FITTED:], name) for name in (MAMBA, TRANSFORMER)}
    meeting = crossover(points)
    if as_json:
        setting = {"family": family, "width": width, "batch": batch, "threads": threads}
        models = {model.name: {"blocks": model.blocks, "parameters": model.parameters} for model in (mamba, other)}
        found = {"points": [asdict(point) for point in points], "exponents": slopes, "crossover": meeting}
        print_json(setting | {"models": models} | found)
    else:
        for model in (mamba, other):
            click.echo(f"{model.name}: {model.blocks} blocks of width {width}, {model.parameters:,} parameters in them")
        for line in [*table(points), *summary(points, slopes, meeting)]:
            click.echo(line)
    if plot is not None:
        draw(points, slopes, meeting).save(plot)


# ------------------------------------------------------------------------------------------------------------- models


def model_config(family: str, width: int, blocks: int, side: int) -> Config:
    """Tokens of 16 numbers: patches of 2 x 2 over four latent channels. The VAE is in no graph here."""
    from mdm.reference.config import load_config

    fields: dict[str, Any] = {"family": family, "width": width, "blocks": blocks, "image_size": 2 * side}
    if family == "mdm":
        fields |= {"latent": 16, "vae_width": 16, "vocabulary": 2, "text_lengths": (1,), "predict_image": "eps"}
    return load_config(fields)


def mamba_model(folder: Path, family: str, width: int, blocks: int, sides: Sequence[int]) -> Model:
    from mdm.export.bundle import OPSETS
    from mdm.export.graphs import GraphSpec, build_graph
    from mdm.export.precision import make_precision
    from mdm.reference.checkpoint import build_model

    config = model_config(family, width, blocks, sides[0])

    def build(weights: Weights, side: int) -> Built:
        spec = GraphSpec("mamba", "step", "image", ("image",), image_size=side * config.patch)
        return build_graph(spec, config, weights, make_precision("fp32"), OPSETS[0])

    return write_model(folder, MAMBA, blocks, build_model(config).state_dict(), build, sides)


def transformer_model(folder: Path, width: int, blocks: int, parameters: int, sides: Sequence[int]) -> Model:
    from mdm.tools.bench.transformer import transformer_as_heavy

    transformer = transformer_as_heavy(model_config("mdm", width, 1, sides[0]), blocks, parameters)
    return write_model(folder, TRANSFORMER, blocks, transformer.tensors(), transformer.step_graph, sides)


def write_model(
    folder: Path,
    name: str,
    blocks: int,
    tensors: Mapping[str, Tensor],
    build: Callable[[Weights, int], Built],
    sides: Sequence[int],
) -> Model:
    """Graphs of all sizes and, in `folder`, the weights that they share."""
    from mdm.export.weights import Weights

    weights = Weights(checkpoint_of(tensors), "float32")
    built = {side: build(weights, side) for side in sides}
    folder.mkdir()
    weights.write_derived(folder)
    for one in built.values():
        weights.place(one.model, one.stored)
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if ".blocks." in name)
    graphs = {side: one.model.SerializeToString() for side, one in built.items()}
    return Model(name, blocks, parameters, graphs, folder)


def checkpoint_of(tensors: Mapping[str, Tensor]) -> Checkpoint:
    """A checkpoint in memory: what the graphs ask for of it is written as derived weights."""
    from mdm.export.weights import Checkpoint

    class Held(Checkpoint):
        def __init__(self) -> None:
            self.format = "memory"
            self.expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            self.found = {name: (shape, "float32") for name, shape in self.expected.items()}

        def read(self, name: str) -> Tensor:
            return tensors[name]

    return Held()


# -------------------------------------------------------------------------------------------------------- measurement


def measure(models: Sequence[Model], side: int, batch: int, threads: int | None, seconds: float) -> Point:
    import onnxruntime  # noqa: F401 (its own memory is no model's)

    from mdm.tools.bench.clock import memory_peak, take_turns, timed

    calls: dict[str, Call] = {}
    megabytes = {}
    for model in models:

        def start(model: Model = model) -> None:
            calls[model.name] = step_call(model, side, batch, threads)
            calls[model.name]()  # also warms up

        give_back()
        peak = memory_peak(start)
        if peak is None:
            start()
        else:
            megabytes[model.name] = peak / 2**20
    times = take_turns({name: timed(call) for name, call in calls.items()}, seconds)
    return Point(side**2, {name: 1000 * statistics.median(took) for name, took in times.items()}, megabytes)


def give_back() -> None:
    """Hand freed memory back to the system; a model that takes it up again would seem to need none."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def step_call(model: Model, side: int, batch: int, threads: int | None) -> Call:
    """One step on random inputs, in a session as the runtime has it."""
    import numpy as np
    import onnxruntime

    from mdm.runtime.ort import session_options

    options = session_options(model.folder, threads)
    session = onnxruntime.InferenceSession(model.graphs[side], options, providers=["CPUExecutionProvider"])
    chance = np.random.default_rng(0)
    feed: dict[str, Any] = {}
    for spec in session.get_inputs():
        shape = [batch if size == "batch" else size for size in spec.shape]
        kind = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}[spec.type]
        feed[spec.name] = chance.standard_normal(shape, np.float32) if kind is np.float32 else np.zeros(shape, kind)
    return lambda: session.run(None, feed)


# ------------------------------------------------------------------------------------------------------------ reading


def exponent(points: Sequence[Point], name: str) -> float:
    """k of time ~ tokens^k: the slope of a straight line through the points, both axes logarithmic."""
    x = [math.log(point.tokens) for point in points]
    y = [math.log(point.milliseconds[name]) for point in points]
    return statistics.linear_regression(x, y).slope


def crossover(points: Sequence[Point]) -> float | None:
    """The tokens from which on Mamba is faster, between two points by a straight line, both axes logarithmic.

    0 if it is faster at the first point too, None if it is not at the last.
    """
    if points[-1].ratio < 1:
        return None
    for before, after in reversed(list(itertools.pairwise(points))):
        if before.ratio < 1:
            way = math.log(before.ratio) / math.log(before.ratio / after.ratio)
            return float(before.tokens * (after.tokens / before.tokens) ** way)
    return 0.0


def table(points: Sequence[Point]) -> Iterator[str]:
    yield "tokens | Mamba ms | transformer ms | transformer / Mamba | MB of Mamba | of transformer"
    yield "---|---|---|---|---|---"
    for point in points:
        times = [f"{point.milliseconds[name]:.1f}" for name in (MAMBA, TRANSFORMER)]
        memory = [f"{point.megabytes[name]:.0f}" if point.megabytes else "-" for name in (MAMBA, TRANSFORMER)]
        yield " | ".join([f"{point.tokens:,}", *times, f"{point.ratio:.2f}", *memory])


def summary(points: Sequence[Point], slopes: Mapping[str, float], meeting: float | None) -> Iterator[str]:
    fitted = points[-FITTED:]
    powers = ", ".join(f"{name} k = {slope:.2f}" for name, slope in slopes.items())
    yield f"time ~ tokens^k from {fitted[0].tokens:,} to {fitted[-1].tokens:,} tokens: {powers}"
    yield f"crossover: {where(points, meeting)} tokens"


def where(points: Sequence[Point], meeting: float | None) -> str:
    if meeting is None:
        return f"above {points[-1].tokens:,}"
    return f"{meeting:,.0f}" if meeting else f"below {points[0].tokens:,}"


def draw(points: Sequence[Point], slopes: Mapping[str, float], meeting: float | None) -> Image:
    from mdm.tools.bench.plot import Line, Mark, draw_lines

    lines = [
        Line(f"{name}, tokens^{slope:.2f}", [(point.tokens, point.milliseconds[name]) for point in points])
        for name, slope in slopes.items()
    ]
    marks = [Mark(meeting, f"even at {meeting:,.0f} tokens")] if meeting else []
    return draw_lines("Time per step", "latent tokens", "milliseconds", lines, marks, [p.tokens for p in points])
