"""Checkpoints: published names and shapes, resized positions, tensors that do not fit, and writing whole or not at all.

`data/dim-keys` lists every tensor of the four published DiM models. The other tests use a network of 3 blocks. Files
that are broken, or hold code: test_checkpoint_broken.py.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdm.plugins.errors import InputError
from mdm.reference import checkpoint
from mdm.reference.backbone import resize_position
from mdm.reference.checkpoint import build_model, load_model, published_name, read_tensors, save_checkpoint
from mdm.reference.config import PRESETS, Config, config_from_dict, load_config

KEYS = Path(__file__).parent.parent / "data" / "dim-keys"
TINY: dict[str, Any] = {
    "family": "dim", "width": 16, "blocks": 3, "in_channels": 4, "image_size": 8, "classes": 3, "state": 4
}  # fmt: skip
SUFFIXES = [".safetensors", ".pth", ".pt"]
POSITION = "additional_embed"
Tensors = dict[str, Tensor]


def config(**fields: Any) -> Config:
    return config_from_dict({**TINY, **fields})


def weights(published: bool = True, **fields: Any) -> Tensors:
    """Random values for every tensor, by published or by our own names."""
    torch.manual_seed(0)
    tensors = build_model(config(**fields)).state_dict()
    return {published_name(name) if published else name: torch.randn(value.shape) for name, value in tensors.items()}


def write(path: Path, tensors: Tensors) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


def equal(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def told(path: Path, **fields: Any) -> str:
    """The message of the error that loading ends with."""
    with pytest.raises(InputError) as caught:
        load_model(path, config(**fields))
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("preset", "listing"),
    [
        ("dim-small", "small_cifar10"),
        ("dim-large", "large_imagenet256"),
        ("dim-huge-256", "huge_imagenet256"),
        ("dim-huge-512", "huge_imagenet512"),
    ],
)
def test_presets_have_exactly_the_published_tensors(preset: str, listing: str) -> None:
    published = json.loads((KEYS / f"{listing}.json").read_text())
    with torch.device("meta"):
        ours = build_model(load_config(preset)).state_dict()
    found = {published_name(name): [str(v.dtype).removeprefix("torch."), list(v.shape)] for name, v in ours.items()}
    assert len(found) == len(ours) == published["n_tensors"]
    assert found == published["tensors"]
    assert sum(value.numel() for value in ours.values()) == published["n_params"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("published", [True, False], ids=["published", "own"])
def test_loads_by_either_name(suffix: str, published: bool, tmp_path: Path) -> None:
    model = load_model(write(tmp_path / f"weights{suffix}", weights(published)), config())
    assert equal(model.state_dict(), weights(published=False))
    assert not model.training
    assert all(
        value.dtype == torch.float32 and not value.is_meta for value in chain(model.parameters(), model.buffers())
    )


@pytest.mark.parametrize(("width", "kind"), [(512, "skip.both."), (528, "skip.stream.")])
def test_both_layouts_of_the_skips(width: int, kind: str, tmp_path: Path) -> None:
    """One matrix over [h, s] up to width 512, a matrix each above; the two forms compute the same."""
    tensors = weights(width=width)
    model = load_model(write(tmp_path / "weights.pth", tensors), config(width=width))
    assert equal(model.state_dict(), weights(published=False, width=width))
    assert any(kind in name for name in model.state_dict())
    skip, h, s = model.backbone.blocks[2].skip, torch.randn(1, 2, width), torch.randn(1, 2, width)
    name = "transformer_blocks.2.skip_linear"
    if width == 512:
        expected = torch.cat([h, s], -1) @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]
    else:
        expected = h @ tensors[f"{name}.0.weight"].T + s @ tensors[f"{name}.1.weight"].T
        expected = expected + tensors[f"{name}.0.bias"] + tensors[f"{name}.1.bias"]
    torch.testing.assert_close(skip(h, s), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: value.to(dtype) for name, value in weights(published=False).items()}
    model = load_model(write(tmp_path / "weights.safetensors", tensors), config())
    assert equal(model.state_dict(), {name: value.float() for name, value in tensors.items()})


# --------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("size", [4, 8, 16, 22])
def test_positions_of_another_size_are_resized_at_load(size: int, tmp_path: Path) -> None:
    tensors = weights()
    model = load_model(write(tmp_path / "weights.pth", tensors), config(image_size=size))
    learned, side = tensors[POSITION], size // 2
    position = model.backbone.position
    assert torch.equal(position[:, :2], learned[:, :2])
    assert torch.equal(position[:, 2:], resize_position(learned[:, 2:], side, side))
    if size == 8:
        assert torch.equal(position, learned)
    x, t = torch.randn(1, 4, size, size), torch.tensor([500.0])
    assert model(x, t).shape == x.shape


def test_resizing_to_the_same_size_is_the_identity() -> None:
    learned = torch.randn(1, 49, 6)
    assert torch.equal(resize_position(learned, 7, 7), learned)


def test_resizing_is_linear_between_cell_centres() -> None:
    """align_corners False: twice the size puts samples a quarter cell beside the old centres; ends are held."""
    row = torch.tensor([0.0, 1.0]).repeat(2)[None, :, None]  # [1,4,1], a 2 x 2 grid that rises to the right
    wide = resize_position(row, 4, 4).view(4, 4)
    torch.testing.assert_close(wide, torch.tensor([0, 0.25, 0.75, 1]).expand(4, 4))


# ----------------------------------------------------------------------------------------- files that do not fit


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_tensor_is_named(suffix: str, tmp_path: Path) -> None:
    tensors = weights()
    del tensors["transformer_blocks.1.attn1.D"]
    message = told(write(tmp_path / f"weights{suffix}", tensors))
    assert "'transformer_blocks.1.attn1.D'" in message
    assert f"{len(tensors)} found" in message
    assert f"expected {len(tensors) + 1} tensors" in message


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    assert "'optimizer.step'" in told(write(tmp_path / "weights.pth", {**weights(), "optimizer.step": torch.ones(1)}))


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("proj_out_2.weight", (16, 17)), ("proj_out_2.weight", (16,)), ("transformer_blocks.0.attn1.D", (1, 32)),
        (POSITION, (1, 2, 16)), (POSITION, (1, 17, 16)), (POSITION, (2, 18, 16)), (POSITION, (1, 18, 15)),
        (POSITION, (2, 6, 16)), (POSITION, (18, 16)), (POSITION, (1, 0, 16)),
    ],
)  # fmt: skip
def test_a_misshapen_tensor_is_named_with_both_shapes(key: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = weights()
    expected, tensors[key] = tuple(tensors[key].shape), torch.zeros(shape)
    message = told(write(tmp_path / "weights.pth", tensors))
    assert f"'{key}'" in message
    assert f"has shape {shape}, expected {expected}" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
def test_a_tensor_that_is_not_of_floats_is_named(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = weights()
    tensors["proj_out_2.weight"] = torch.ones(16, 16).to(dtype)
    message = told(write(tmp_path / "weights.pth", tensors))
    assert "'proj_out_2.weight'" in message
    assert f"type {str(dtype).removeprefix('torch.')}, expected floating point" in message


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_a_tensor_without_plain_values_is_named(kind: str, tmp_path: Path) -> None:
    tensors = weights()
    value = tensors["proj_out_2.weight"]
    tensors["proj_out_2.weight"] = value.to_sparse() if kind == "sparse" else value.to("meta")
    assert "'proj_out_2.weight'" in told(write(tmp_path / "weights.pth", tensors))


def test_one_tensor_under_both_its_names(tmp_path: Path) -> None:
    """Which of the two is meant, nobody can tell."""
    tensors = weights()
    tensors["patch_out.weight"] = tensors["proj_out_2.weight"] + 1
    message = told(write(tmp_path / "weights.pth", tensors))
    assert "proj_out_2.weight" in message
    assert "patch_out.weight" in message


def test_a_name_with_line_breaks_does_not_break_the_message(tmp_path: Path) -> None:
    told(write(tmp_path / "weights.pth", {**weights(), "a\nb\nc\nd\ne": torch.ones(1)}))


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"model": {"a": torch.ones(1)}}, torch.ones(2), None], ids=repr)
def test_content_that_is_not_names_with_tensors(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    assert "weights.pt" in told(tmp_path / "weights.pt")


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert "not a file" in told(tmp_path / "missing.pth")
    assert "not a file" in told(tmp_path)
    (tmp_path / "weights.ckpt").write_bytes(b"")
    assert "expected .safetensors, .pth or .pt" in told(tmp_path / "weights.ckpt")


# ------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("preset", ["mdm-tiny", None])
def test_round_trip_is_bit_equal_and_carries_the_config(preset: str | None, tmp_path: Path) -> None:
    made = load_config(PRESETS[preset]) if preset else config()
    torch.manual_seed(0)
    model = build_model(made)
    path = tmp_path / "deep" / "er" / "weights.safetensors"
    save_checkpoint(path, model.state_dict(), made, step="12")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    facts = json.loads(metadata["mdm"])
    assert facts["step"] == "12"
    again = load_config(facts["config"])
    assert again == made
    assert equal(load_model(path, again).state_dict(), model.state_dict())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_parameters_views_and_strides_are_written_as_they_look(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 3))
    tensors = {"a": parameter, "b": torch.randn(5, 4).T, "c": torch.randn(9)[::2]}
    save_checkpoint(tmp_path / "x.safetensors", tensors, config())
    assert equal(read_tensors(tmp_path / "x.safetensors"), {name: v.detach() for name, v in tensors.items()})


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("exists", [True, False])
def test_a_failure_while_writing_leaves_the_old_file(
    call: str, error: BaseException, exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    if exists:
        save_checkpoint(path, {"a": torch.zeros(3)}, config())
    before = path.read_bytes() if exists else None

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint.os, call, fail)
    with pytest.raises(type(error)):
        save_checkpoint(path, {"a": torch.ones(3)}, config())
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ([path.name] if exists else [])
    assert before is None or path.read_bytes() == before
    save_checkpoint(path, {"a": torch.ones(3)}, config())
    assert torch.equal(read_tensors(path)["a"], torch.ones(3))
