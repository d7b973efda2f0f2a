"""The transformer that Mamba is measured against: its graph against a few lines of torch, and its weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch (extra export) is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime (extra cpu or gpu) is not installed")

import torch.nn.functional as F  # noqa: E402

from mdm.plugins.errors import InputError  # noqa: E402
from mdm.reference.backbone import sinusoid  # noqa: E402
from mdm.runtime.solver import ROW  # noqa: E402
from mdm.tools.bench.scaling import mamba_model, model_config, transformer_model, write_model  # noqa: E402
from mdm.tools.bench.transformer import Transformer, transformer_as_heavy  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

Figure = Callable[[str, float, float], None]


def estimate(weights: dict[str, Tensor], blocks: int, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The same network in torch: z [B,L,d], t [B], y [B] -> eps [B,L,d]."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], 1e-5)

    def attention(x: Tensor, path: str) -> Tensor:
        query, key, value = (
            linear(x, f"{path}.{name}").unflatten(-1, (-1, 64)).transpose(1, 2) for name in ("query", "key", "value")
        )
        scores = (query @ key.mT / 8).softmax(-1)  # [B,heads,L,L]
        return linear((scores @ value).transpose(1, 2).flatten(2), f"{path}.out")

    def mlp(x: Tensor, path: str) -> Tensor:
        return linear(F.silu(linear(x, f"{path}.up")), f"{path}.down")

    time = linear(F.silu(linear(sinusoid(t, 256).to(z), "backbone.time_in")), "backbone.time_out")
    steer = F.silu(time + weights["backbone.class_embed.weight"][y])
    shift, scale, gate = linear(steer, "backbone.modulation")[:, None].chunk(3, -1)  # [B,1,E] each
    h = linear(z, "latent_in") + weights["backbone.position"][:, 2:]
    for index in range(blocks):
        for half in (attention, mlp):
            path = f"backbone.blocks.{index}.{half.__name__}"
            own = weights[f"{path}.modulation"]
            u = norm(h, f"{path}.norm") * (1 + scale + own[1]) + shift + own[0]
            h = h + (1 + gate + own[2]) * half(u, path)
    tokens = sinusoid(t, h.shape[-1]).to(z) + weights["backbone.class_token.weight"][y]
    shift, scale = linear(F.silu(tokens), "backbone.modulation_out")[:, None].chunk(2, -1)
    return linear(norm(h, "backbone.norm_out") * (1 + scale) + shift, "latent_out")


def test_the_graph_computes_what_torch_does(tmp_path: Path, figure: Figure) -> None:
    side, blocks, batch = 5, 2, 3
    transformer = Transformer(model_config("mdm", 128, 1, side), blocks, 80)
    weights = transformer.tensors()
    model = write_model(tmp_path / "model", "transformer", blocks, weights, transformer.step_graph, [side])
    options = ort.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.folder))
    session = ort.InferenceSession(model.graphs[side], options, providers=["CPUExecutionProvider"])

    chance = np.random.default_rng(0)
    feed: dict[str, Any] = {"y": np.array([3, 1000, 0])}
    for name in ("base", "point", "noise"):
        feed[name] = chance.standard_normal((batch, side * side, 16), np.float32)
    feed["history"] = np.zeros((batch, 3, side * side, 16), np.float32)
    feed["row"] = np.zeros((batch, 1, len(ROW)), np.float32)
    feed["row"][:, 0, 0] = t = np.array([1.0, 400.0, 1000.0], np.float32)
    for column in ("alpha", "sigma"):
        feed["row"][..., ROW.index(column)] = 1  # x0 is then the point less eps
    (x0,) = session.run(["x0"], feed)

    exact = {name: tensor.double() for name, tensor in weights.items()}
    truth = estimate(exact, blocks, torch.tensor(feed["point"]).double(), torch.tensor(t), torch.tensor(feed["y"]))
    error = np.abs(feed["point"] - x0 - truth.numpy()).max() / np.abs(truth.numpy()).max()
    figure("bench: transformer's graph against torch", error, 1e-5)


@pytest.mark.parametrize(("family", "width", "blocks"), [("mdm", 192, 3), ("mdm", 256, 5), ("dim", 256, 5)])
@pytest.mark.parametrize("half", [True, False])
def test_its_blocks_are_as_heavy_as_mambas(tmp_path: Path, family: str, width: int, blocks: int, half: bool) -> None:
    mamba = mamba_model(tmp_path / "mamba", family, width, blocks, [4])
    count = (blocks + 1) // 2 if half else blocks
    other = transformer_model(tmp_path / "transformer", width, count, mamba.parameters, [4])
    assert other.blocks == count
    assert other.parameters == pytest.approx(mamba.parameters, rel=0.01)


def test_too_many_blocks_are_told() -> None:
    with pytest.raises(InputError, match="9 transformer blocks of width 128 are heavier without their MLPs"):
        transformer_as_heavy(model_config("mdm", 128, 1, 4), 9, 400_000)
