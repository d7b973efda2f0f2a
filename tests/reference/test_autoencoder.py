"""The image autoencoder against diffusers' AutoencoderKL with random weights, and its files in every layout.

Values are compared in float64, where both sides differ by rounding alone. The other layouts' names are made here by
walking the model as their own code numbers it, not by undoing the table under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference.autoencoder import (
    Autoencoder,
    AutoencoderShape,
    diffusers_name,
    load_autoencoder,
    shape_from_tensors,
)

diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of these tests ([dev] extra)")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # diffusers' own
LIMIT = 1e-12
SMALL = AutoencoderShape(latent=4, channels=(32, 64), blocks=1)
DEEP = AutoencoderShape(picture=1, latent=5, channels=(32, 32, 64), blocks=2)
STABLE_DIFFUSION = AutoencoderShape()


def make_oracle(shape: AutoencoderShape) -> Any:
    """diffusers' model of that shape, with norms and biases drawn too: 1 and 0 would hide a mixed-up one."""
    levels = len(shape.channels)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = diffusers.AutoencoderKL(
            in_channels=shape.picture,
            out_channels=shape.picture,
            latent_channels=shape.latent,
            block_out_channels=shape.channels,
            layers_per_block=shape.blocks,
            norm_num_groups=shape.groups,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    """diffusers' own tensors of the small shape."""
    return dict(make_oracle(SMALL).state_dict())


# CompVis' parts of its attention block, and diffusers'.
ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))


def compvis(shape: AutoencoderShape) -> Iterator[tuple[str, str]]:
    """(CompVis name, diffusers name) of every module that holds tensors."""
    levels = len(shape.channels)
    for half in ("encoder", "decoder"):
        for end in ("conv_in", "conv_out"):
            yield f"{half}.{end}", f"{half}.{end}"
        yield f"{half}.norm_out", f"{half}.conv_norm_out"
        for theirs, ours in (("block_1", "resnets.0"), ("block_2", "resnets.1")):
            for part in ("norm1", "conv1", "norm2", "conv2"):
                yield f"{half}.mid.{theirs}.{part}", f"{half}.mid_block.{ours}.{part}"
        for theirs, ours in ATTENTION:
            yield f"{half}.mid.attn_1.{theirs}", f"{half}.mid_block.attentions.0.{ours}"
    parts = (("norm1",) * 2, ("conv1",) * 2, ("norm2",) * 2, ("conv2",) * 2, ("nin_shortcut", "conv_shortcut"))
    for level in range(levels):  # CompVis' number: 0 is the picture's own size in both halves
        for theirs, ours in parts:
            for j in range(shape.blocks):
                yield f"encoder.down.{level}.block.{j}.{theirs}", f"encoder.down_blocks.{level}.resnets.{j}.{ours}"
            for j in range(shape.blocks + 1):
                there = f"decoder.up_blocks.{levels - 1 - level}"
                yield f"decoder.up.{level}.block.{j}.{theirs}", f"{there}.resnets.{j}.{ours}"
        yield f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
        yield f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{levels - 1 - level}.upsamplers.0.conv"
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name


def in_compvis(tensors: dict[str, Tensor], shape: AutoencoderShape) -> dict[str, Tensor]:
    renamed = {
        f"{theirs}.{leaf}": tensors[f"{ours}.{leaf}"]
        for theirs, ours in compvis(shape)
        for leaf in ("weight", "bias")
        if f"{ours}.{leaf}" in tensors
    }
    return {name: t[:, :, None, None] if "attn_1" in name and t.ndim == 2 else t for name, t in renamed.items()}


def with_old_attention(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in tensors.items()}
    return tensors


def equal(model: Autoencoder, tensors: dict[str, Tensor]) -> bool:
    return all(t.dtype == torch.float32 and torch.equal(t, tensors[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("shape", [SMALL, DEEP], ids=["small", "deep"])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5)], ids=["square", "oblong"])
def test_equals_diffusers(
    shape: AutoencoderShape, height: int, width: int, figure: Callable[[str, float, float], None]
) -> None:
    oracle = make_oracle(shape).double()
    model = Autoencoder(shape).double().eval()
    assert model.state_dict().keys() == oracle.state_dict().keys()
    model.load_state_dict(oracle.state_dict())
    draws = torch.Generator().manual_seed(1)
    side = height * shape.factor, width * shape.factor
    picture = torch.rand(2, shape.picture, *side, dtype=torch.float64, generator=draws) * 2 - 1
    latent = torch.randn(2, shape.latent, height, width, dtype=torch.float64, generator=draws)
    with torch.no_grad():
        encoded, decoded = model.encode(picture), model.decode(latent)
    assert encoded.shape == latent.shape
    assert decoded.shape == picture.shape
    name = f"autoencoder {'x'.join(map(str, shape.channels))} {height}x{width}"
    wanted = oracle.encode(picture).latent_dist.mean
    figure(f"{name} encode", (encoded - wanted).abs().max() / wanted.abs().max(), LIMIT)
    wanted = oracle.decode(latent).sample
    figure(f"{name} decode", (decoded - wanted).abs().max() / wanted.abs().max(), LIMIT)


def test_stable_diffusion_size() -> None:
    with torch.device("meta"):
        model = Autoencoder(STABLE_DIFFUSION)
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863
    assert model.shape.factor == 8
    assert shape_from_tensors(model.state_dict()) == STABLE_DIFFUSION


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("layout", ["diffusers", "old attention", "compvis", "first stage"])
def test_layouts(layout: str, suffix: str, small: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = dict(small)
    if layout == "old attention":
        tensors = with_old_attention(small)
    elif layout != "diffusers":
        tensors = in_compvis(small, SMALL)
        tensors["loss.logvar"] = torch.zeros(())
        tensors["loss.discriminator.main.3.num_batches_tracked"] = torch.tensor(7)
        if layout == "first stage":
            tensors = {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
    assert (tensors.keys() == small.keys()) == (layout == "diffusers")
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    model = load_autoencoder(path)
    assert model.shape == SMALL
    assert not model.training
    assert equal(model, small)


@pytest.mark.parametrize("shape", [SMALL, DEEP, STABLE_DIFFUSION], ids=["small", "deep", "stable diffusion"])
def test_names(shape: AutoencoderShape) -> None:
    """Each tensor has one name in CompVis' layout, and each name in any layout leads to it."""
    with torch.device("meta"):
        tensors = Autoencoder(shape).state_dict()
    levels = len(shape.channels)
    theirs = in_compvis(tensors, shape)
    assert len(theirs) == len(tensors)
    for layout in (tensors, theirs, with_old_attention(tensors)):
        assert {diffusers_name(name, levels) for name in layout} == tensors.keys()
    assert shape_from_tensors(theirs) == shape


def test_names_of_the_released_file() -> None:
    for theirs, ours in {
        "first_stage_model.encoder.down.1.block.0.nin_shortcut.bias":
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        "decoder.up.3.block.2.norm1.weight": "decoder.up_blocks.0.resnets.2.norm1.weight",
        "decoder.up.1.upsample.conv.weight": "decoder.up_blocks.2.upsamplers.0.conv.weight",
        "decoder.mid.attn_1.proj_out.weight": "decoder.mid_block.attentions.0.to_out.0.weight",
        "encoder.mid.attn_1.norm.weight": "encoder.mid_block.attentions.0.group_norm.weight",
    }.items():  # fmt: skip
        assert diffusers_name(theirs, levels=4) == ours


def test_half_precision_file_is_read_in_float32(small: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in small.items()}, tmp_path / "half.safetensors")
    model = load_autoencoder(tmp_path / "half.safetensors")
    assert equal(model, {name: tensor.half().float() for name, tensor in small.items()})


Change = Callable[[dict[str, Tensor]], object]
NORM = "decoder.up.1.block.0.norm1.weight"  # by its CompVis name: [64], in the decoder's first level
BROKEN: dict[str, tuple[Change, str]] = {
    "missing": (
        lambda t: t.pop(NORM),
        "'decoder.up_blocks.0.resnets.0.norm1.weight'\nfound no tensor, expected floats (64,)",
    ),
    "missing level": (lambda t: t.pop("encoder.down.1.block.0.conv1.weight"), "under the name 'encoder.down_blocks.1."),
    "missing encoder": (lambda t: t.pop("encoder.conv_in.weight"), "is it an image autoencoder"),
    "wrong shape": (lambda t: t.update({NORM: torch.ones(32)}), f"'{NORM}'\nfound floats (32,), expected floats (64,)"),
    "wrong axes": (lambda t: t.update({"encoder.conv_in.weight": torch.ones(32)}), "found floats (32,) under the name"),
    "wrong type": (lambda t: t.update({NORM: torch.ones(64, dtype=torch.int64)}), f"'{NORM}'\nfound torch.int64"),
    "not dense": (lambda t: t.update({NORM: torch.ones(64).to_sparse()}), "found torch.float32, torch.sparse_coo"),
    "no values": (lambda t: t.update({NORM: torch.ones(64, device="meta")}), "torch.strided on meta, (64,)"),
    "unknown": (lambda t: t.update(extra=torch.ones(2)), "'extra'\nfound floats (2,), expected no tensor"),
    "twice": (lambda t: t.update({"decoder.conv_norm_out.bias": torch.ones(32)}), "one tensor under two names"),
    "few channels": (
        lambda t: t.update({"encoder.down.0.block.0.conv1.weight": torch.ones(16, 16, 3, 3)}),
        "(16, 64) level channels\nexpected 1 to 32768 of each, and in each level a multiple of 32",
    ),
    "huge": (
        lambda t: t.update({"encoder.conv_in.weight": torch.ones(1).expand(1, 2**40, 1, 1)}),
        "found 1099511627776 picture, 4 latent",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, small: dict[str, Tensor], tmp_path: Path) -> None:
    change, message = BROKEN[case]
    tensors = in_compvis(small, SMALL)
    change(tensors)
    path = tmp_path / "weights.pth"
    torch.save(tensors, path)
    with pytest.raises(InputError) as caught:
        load_autoencoder(path)
    text = str(caught.value)
    assert message in text
    assert str(path) in text
    assert text.count("\n") <= 2


def test_wrong_inputs() -> None:
    model = Autoencoder(SMALL)
    with pytest.raises(InputError, match="both sides multiples of 2"):
        model.encode(torch.zeros(1, 3, 8, 7))
    with pytest.raises(InputError, match=r"expected \(batch, 3, height, width\)"):
        model.encode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(InputError, match=r"expected \(batch, 4, height, width\)"):
        model.decode(torch.zeros(1, 3, 8, 8))
