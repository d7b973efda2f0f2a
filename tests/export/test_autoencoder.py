"""The image autoencoder's graphs in ONNX Runtime against the torch module, from one file at several sizes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto
from safetensors.torch import save_file
from torch import Tensor

from mdm.export.autoencoder import decode_image, encode_image
from mdm.export.graph import Graph
from mdm.export.precision import make_precision
from mdm.export.weights import Checkpoint, Weights
from mdm.reference import load_config
from mdm.reference.autoencoder import Autoencoder, AutoencoderShape
from mdm.reference.checkpoint import build_model

SHAPES = {
    "one-block": AutoencoderShape(channels=(32, 32, 64), blocks=1),
    "two-blocks": AutoencoderShape(picture=1, latent=5, channels=(32, 64), blocks=2),
}
SCALE = 0.18215  # Stable Diffusion's
SIZES = ((1, 4, 4), (2, 3, 7), (3, 6, 2))  # batch, height and width of the latents
BUILDERS = {"encode_image": encode_image, "decode_image": decode_image}
LIMITS = {"fp32": 1e-5, "fp16": 2e-2}
CASES = [
    *((name, precision, opset) for name in SHAPES for precision in LIMITS for opset in (20, 25)),
    ("one-block", "fp16", 20, "*.conv2", "*.to_k", "*.to_out.0", "*.mid_block.resnets.0"),  # these stay float32
]
HALVES = pytest.mark.parametrize("half", BUILDERS)
EVERY_SHAPE = pytest.mark.parametrize("exported", [(s, "fp32", 20) for s in SHAPES], indirect=True, ids=SHAPES)


class Exported(NamedTuple):
    """Both graphs of one autoencoder, written."""

    label: str
    model: Autoencoder
    folder: Path
    precision: str

    def file(self, half: str) -> Path:
        return self.folder / f"{half}.onnx"

    def graph(self, half: str) -> ModelProto:
        return onnx.load(self.file(half), load_external_data=False)


def make_autoencoder(shape: AutoencoderShape) -> Autoencoder:
    """Random weights, norms and biases drawn too: 1 and 0 would hide a mixed-up one."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = Autoencoder(shape)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., dict[str, Any]]
) -> Exported:
    name, precision, opset, *kept = request.param
    model, folder = make_autoencoder(SHAPES[name]), tmp_path_factory.mktemp("autoencoder")
    config = load_config(tiny(family="dim"))
    save_file(build_model(config).state_dict(), folder / "dim.safetensors")
    made = make_precision(precision, kept)
    weights = Weights(Checkpoint(folder / "dim.safetensors", config), made.activations)
    graphs = {half: Graph(half, weights, made, opset) for half in BUILDERS}
    for half, build in BUILDERS.items():
        build(graphs[half], model, SCALE)
    weights.write_derived(folder)
    for half, graph in graphs.items():
        proto = graph.model()
        weights.place(proto, graph.stored)
        onnx.save(proto, folder / f"{half}.onnx")
    return Exported(f"{name} {precision}{' in part' if kept else ''} opset {opset}", model, folder, precision)


def given_and_expected(model: Autoencoder, half: str, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    shape, generator = model.shape, torch.Generator().manual_seed(height)
    with torch.inference_mode():
        if half == "decode_image":
            z = torch.randn(batch, shape.latent, height, width, generator=generator)
            return z, model.decode(z / SCALE)
        sides = height * shape.factor, width * shape.factor
        picture = torch.rand(batch, shape.picture, *sides, generator=generator) * 2 - 1
        return picture, model.encode(picture) * SCALE


@pytest.mark.parametrize("exported", CASES, indirect=True, ids=lambda case: "-".join(map(str, case)))
@HALVES
def test_equals_torch(exported: Exported, half: str, figure: Callable[[str, float, float], None]) -> None:
    onnx.checker.check_model(exported.file(half), full_check=True)
    session = ort.InferenceSession(exported.file(half), providers=["CPUExecutionProvider"])
    worst = 0.0
    for size in SIZES:
        given, expected = given_and_expected(exported.model, half, *size)
        (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        assert found.dtype == "float32"
        assert found.shape == expected.shape
        worst = max(worst, float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max()))
    figure(f"{half} {exported.label}, relative", worst, LIMITS[exported.precision])


@EVERY_SHAPE
@HALVES
def test_holds_the_weights_of_its_half_alone(exported: Exported, half: str) -> None:
    expected = {f"autoencoder.{name}" for name in exported.model.state_dict() if is_of(half, name)}
    found = {t.name for t in exported.graph(half).graph.initializer if t.external_data}
    assert found == expected


def is_of(half: str, name: str) -> bool:
    return name.startswith(("encoder.", "quant_conv.") if half == "encode_image" else ("decoder.", "post_quant_conv."))


@EVERY_SHAPE
@HALVES
def test_nodes_follow_the_modules(exported: Exported, half: str) -> None:
    nodes = exported.graph(half).graph.node
    modules = {f"autoencoder.{name}" for name, _ in exported.model.named_modules() if name} | {"autoencoder"}
    paths = {n.name.rpartition(".")[0].removesuffix(".silu") for n in nodes if n.name not in ("z", "picture")}
    assert paths <= modules
    assert len({n.name for n in nodes}) == len(nodes)
    assert f"autoencoder.{half[:2]}coder.mid_block.attentions.0.MatMul" in {n.name for n in nodes}


@EVERY_SHAPE
@HALVES
def test_only_the_attention_asks_for_a_shape(exported: Exported, half: str) -> None:
    graph = exported.graph(half)
    shapes = [n.name for n in graph.graph.node if n.op_type == "Shape"]
    assert [name.rpartition(".")[0].split(".")[-2:] for name in shapes] == [["attentions", "0"]]
    assert {"Pad", "Expand", "Tile", "ConstantOfShape"}.isdisjoint(n.op_type for n in graph.graph.node)


@EVERY_SHAPE
@HALVES
def test_residual_blocks_are_equally_long(exported: Exported, half: str) -> None:
    blocks = (re.match(r".*resnets\.\d+(?!.*conv_shortcut)", n.name) for n in exported.graph(half).graph.node)
    count = Counter(block[0] for block in blocks if block)
    assert set(count.values()) == {17}  # 2 norms of 5, 2 silus of 2, 2 convolutions, Add


@pytest.mark.parametrize("exported", [("one-block", "fp16", 20)], indirect=True, ids=["fp16"])
@HALVES
def test_fp16_keeps_norms_and_ends_float32(exported: Exported, half: str) -> None:
    graph = exported.graph(half).graph
    kinds = {t.name: t.data_type for t in graph.initializer if t.external_data}
    norms = {name for name in kinds if "norm" in name}
    assert norms
    assert {kinds[name] for name in norms} == {onnx.TensorProto.FLOAT}
    assert {kinds[name] for name in kinds.keys() - norms} == {onnx.TensorProto.FLOAT16}
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
