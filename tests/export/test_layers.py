"""Each layer in ONNX Runtime against its torch function, at random sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdm.export import layers
from mdm.export.graph import Graph
from mdm.plugins import register
from mdm.reference import backbone
from mdm.reference.mixer import CausalConv, GroupedRMSNorm

Blank = Callable[..., Graph]
Run = Callable[..., list[np.ndarray]]
OPSETS = pytest.mark.parametrize("opset", [20, 22, 23, 25])
SIZES = pytest.mark.parametrize(("batch", "length", "width"), [(1, 1, 2), (2, 7, 24), (3, 50, 128)])


def hold(found: np.ndarray, expected: Tensor) -> None:
    """The largest difference over the largest value stays within float32's rounding."""
    assert found.dtype == np.float32
    assert found.shape == tuple(expected.shape)
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-6 * expected.abs().max()


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw)


@SIZES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [None, (1, 3)])
def test_linear(
    batch: int, length: int, width: int, bias: bool, rows: tuple[int, int] | None,
    blank_graph: Blank, run_graph: Run, draw: torch.Generator,
) -> None:  # fmt: skip
    weight, b, x = normal(draw, 5, width), normal(draw, 5), normal(draw, batch, length, width)
    g = blank_graph({"to.it.weight": weight, "to.it.bias": b})
    with g.scope("to"):
        y = layers.linear(g, g.input("x", "float32", ["batch", "length", width]), "it", "mixer", bias, rows)
    assert ("to.it.bias[1:3]" if rows else "to.it.bias") in g.stored or not bias
    g.output("y", y, ["batch", "length", rows[1] - rows[0] if rows else 5])
    part = slice(*rows) if rows else slice(None)
    hold(run_graph(g, x=x)[0], F.linear(x, weight[part], b[part] if bias else None))


@SIZES
@OPSETS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # at the smaller one eps counts
def test_rms_norm(
    batch: int, length: int, width: int, opset: int, groups: int, scale: float,
    blank_graph: Blank, run_graph: Run, draw: torch.Generator,
) -> None:  # fmt: skip
    x = normal(draw, batch, length, width) * scale
    norm = GroupedRMSNorm(width, groups) if groups > 1 else torch.nn.RMSNorm(width, eps=1e-5)
    torch.nn.init.normal_(norm.weight, generator=draw)
    g = blank_graph({"norm.weight": norm.weight.detach()}, opset=opset)
    y = layers.rms_norm(g, g.input("x", "float32", ["batch", "length", width]), "norm", groups=groups)
    g.output("y", y, ["batch", "length", width])
    operators = [node.op_type for node in g.nodes]
    assert ("RMSNormalization" in operators) == (opset >= 23 and groups == 1)
    hold(run_graph(g, x=x)[0], norm(x).detach())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_runtime_fuses_the_spelled_out_norm(
    precision: str, blank_graph: Blank, run_graph: Run, draw: torch.Generator, tmp_path: Path
) -> None:
    g = blank_graph({"norm.weight": normal(draw, 24)}, precision)
    x = g.input("x", "float32", ["batch", "length", 24])
    u = layers.rms_norm(g, x * x, "norm") * 2.0
    g.output("y", g.cast(g.cast(u, g.precision.activations), "float32"), ["batch", "length", 24])
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # it warns that the file is for this machine alone
    run_graph(g, options, x=normal(draw, 2, 3, 24))
    operators = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node}
    assert "SimplifiedLayerNormalization" in operators
    assert operators.isdisjoint({"ReduceMean", "Sqrt", "Pow", "Div"})


def test_silu(blank_graph: Blank, run_graph: Run, draw: torch.Generator) -> None:
    x, g = normal(draw, 4, 9) * 8, blank_graph()
    g.output("y", layers.silu(g.input("x", "float32", [4, 9])), [4, 9])
    hold(run_graph(g, x=x)[0], F.silu(x))


def test_embedding(blank_graph: Blank, run_graph: Run, draw: torch.Generator) -> None:
    table, ids = normal(draw, 6, 5), torch.tensor([[0, 5, 3], [5, 5, 1]])
    g = blank_graph({"class_embed.weight": table})
    g.output("y", layers.embedding(g, g.input("ids", "int64", [2, 3]), "class_embed", "time"), [2, 3, 5])
    assert np.array_equal(run_graph(g, ids=ids)[0], table[ids])


@pytest.mark.parametrize("width", [2, 32, 256, 1536])
def test_sinusoid(
    width: int, blank_graph: Blank, run_graph: Run, draw: torch.Generator, figure: Callable[[str, float, float], None]
) -> None:
    """Against float64: at t = 1000 an angle in float32 is off by half of 6e-5, in the reference as well."""
    t = torch.cat([torch.tensor([1.0, 999.0, 1000.0]), torch.rand(50, generator=draw) * 1000])
    g = blank_graph()
    g.output("y", layers.sinusoid(g, g.input("t", "float32", ["batch"]), width), ["batch", width])
    (found,) = run_graph(g, t=t)
    ours = (torch.from_numpy(found) - backbone.sinusoid(t.double(), width)).abs().max()
    theirs = (backbone.sinusoid(t, width) - backbone.sinusoid(t.double(), width)).abs().max()
    assert found.dtype == np.float32
    figure(f"sinusoid of width {width}, absolute", ours, 1.2e-4)
    figure(f"sinusoid of width {width} beside the reference's own rounding", ours / (theirs + 1e-6), 1.5)


@pytest.mark.parametrize(("height", "side"), [(1, 1), (4, 7), (9, 3)])
def test_grid_conv(height: int, side: int, blank_graph: Blank, run_graph: Run, draw: torch.Generator) -> None:
    conv, x = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6), normal(draw, 2, height, side, 6)
    g = blank_graph({f"conv_in.{name}": p.detach() for name, p in conv.named_parameters()})
    y = layers.grid_conv(g, g.input("x", "float32", ["batch", height, side, 6]), "conv_in")
    g.output("y", y, ["batch", height, side, 6])
    hold(run_graph(g, x=x)[0], backbone.convolve(conv, x).detach())


@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 33])
@pytest.mark.parametrize("native", [False, True])
def test_short_conv(
    taps: int, length: int, native: bool, blank_graph: Blank, run_graph: Run, draw: torch.Generator
) -> None:
    conv, x = CausalConv(10, taps), normal(draw, 2, length, 10)
    g = blank_graph({f"conv1d.{name}": p.detach() for name, p in conv.named_parameters()})
    y = layers.short_conv(g, g.input("x", "float32", ["batch", "length", 10]), "conv1d")
    g.output("y", y, ["batch", "length", 10])
    assert [node.name for node in g.nodes] == ["conv1d.conv", "y"]
    options = ort.SessionOptions()
    if native:
        register(options)
    (found,) = run_graph(g, options, x=x)
    hold(found, F.silu(conv(x)).detach())


def test_a_convolution_has_the_mixers_type_and_float32_weights(blank_graph: Blank) -> None:
    g = blank_graph({"conv1d.weight": torch.ones(4, 1, 3), "conv1d.bias": torch.ones(4)}, "fp16")
    y = layers.short_conv(g, g.input("x", "float32", [1, 2, 4]), "conv1d")
    assert y.dtype == "float16"
    assert {(s.dtype, s.shape) for s in g.stored.values()} == {("float32", (4, 3)), ("float32", (4,))}


@pytest.mark.parametrize("role", ["mixer", "time"])
def test_a_layer_has_its_roles_type(role: str, blank_graph: Blank) -> None:
    g = blank_graph({"it.weight": torch.ones(5, 4), "it.bias": torch.ones(5), "norm.weight": torch.ones(5)}, "fp16")
    y = layers.linear(g, g.input("x", "float32", [2, 4]), "it", role)
    kind = "float16" if role == "mixer" else "float32"
    assert (y.dtype, {stored.dtype for stored in g.stored.values()}) == (kind, {kind})
    assert layers.rms_norm(g, y, "norm").dtype == "float32"
