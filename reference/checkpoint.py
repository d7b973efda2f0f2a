"""Reading and writing checkpoints: `.safetensors`, or `.pth`/`.pt` without code in them.

A file is trusted in nothing: it is checked against the model tensor by tensor before a weight is used. Released DiM
files use the names of the library they were trained with; `published_name` says which tensor of ours each one is.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mdm.plugins.errors import InputError
from mdm.reference.backbone import resize_position
from mdm.reference.config import Config, load_config
from mdm.reference.dim import DiM
from mdm.reference.multimodal import MDM

# Our name -> the name in a released DiM file, longest rule first. Tensors have equal shapes on both sides.
PUBLISHED: tuple[tuple[str, str], ...] = (
    (r"patch_in\.", "pos_embed.proj."),
    (r"patch_out\.", "proj_out_2."),
    (r"backbone\.position$", "additional_embed"),
    (r"backbone\.sep$", "a4m_adapter.pad_token_dec_split"),
    (r"backbone\.pad$", "a4m_adapter.pad_token"),
    (r"backbone\.conv_in\.", "a4m_adapter.first_smoother."),
    (r"backbone\.conv_out\.", "a4m_adapter.last_smoother."),
    (r"backbone\.time_in\.", "adaln_single.emb.timestep_embedder.linear_1."),
    (r"backbone\.time_out\.", "adaln_single.emb.timestep_embedder.linear_2."),
    (r"backbone\.class_embed\.", "adaln_single.emb.class_embedder.embedding_table."),
    (r"backbone\.modulation\.", "adaln_single.linear."),
    (r"backbone\.class_token\.", "label_emb."),
    (r"backbone\.norm_out\.", "norm_out.norm."),
    (r"backbone\.modulation_out\.", "proj_out_1."),
    (r"backbone\.blocks\.(\d+)\.modulation$", r"transformer_blocks.\1.scale_shift_table"),
    (r"backbone\.blocks\.(\d+)\.norm\.", r"transformer_blocks.\1.norm1.norm."),
    (r"backbone\.blocks\.(\d+)\.mixers\.0\.", r"transformer_blocks.\1.attn1."),
    (r"backbone\.blocks\.(\d+)\.skip\.both\.", r"transformer_blocks.\1.skip_linear."),
    (r"backbone\.blocks\.(\d+)\.skip\.stream\.", r"transformer_blocks.\1.skip_linear.0."),
    (r"backbone\.blocks\.(\d+)\.skip\.sent\.", r"transformer_blocks.\1.skip_linear.1."),
)


def published_name(name: str) -> str:
    for ours, theirs in PUBLISHED:
        if re.match(ours, name):
            return re.sub(f"^{ours}", theirs, name)
    return name


def build_model(config: Config) -> DiM | MDM:
    return DiM(config) if config.family == "dim" else MDM(config)


def load_model(path: str | Path, config: str | Path | Mapping[str, Any] | Config) -> DiM | MDM:
    """The model of `config` (preset name, dict, JSON file) with the weights of `path`, in float32, in eval mode."""
    config = load_config(config)
    with torch.device("meta"):
        model = build_model(config)
    tensors = fit_tensors(read_tensors(path), model, path)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def read_tensors(path: str | Path, mapped: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint file, by the names in it; `mapped`: read from a .pth only when looked at."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint '{path}' is not a file")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise InputError(f"checkpoint '{path}' is not a sound safetensors file: {error}") from error
    if path.suffix not in (".pth", ".pt"):
        raise InputError(f"checkpoint '{path}' ends in '{path.suffix}', expected .safetensors, .pth or .pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except Exception as error:  # an unpickler fed with noise raises anything
        raise InputError(
            f"checkpoint '{path}' cannot be read as plain tensors\n"
            f"found: {str(error).splitlines()[0][:150] if str(error) else type(error).__name__}\n"
            "expected what torch.save(model.state_dict()) writes; a file with code in it is never run"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"checkpoint '{path}' holds a {type(content).__name__}, expected names with tensors only")
    return content


def fit_tensors(found: Mapping[str, Tensor], model: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """The file's tensors under the model's names, in float32; the first that does not fit is an error."""
    facts = {name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in found.items()}
    fitted: dict[str, Tensor] = {}
    for name, given_name in fit_names(facts, model, path).items():
        tensor = found[given_name]
        check_plain(given_name, tensor, path)
        if name == "backbone.position":
            tensor = position_for(tensor, model.state_dict()[name].shape)
        fitted[name] = tensor.float()
    return fitted


def check_plain(name: str, tensor: Tensor, path: str | Path) -> None:
    if tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"tensor '{name}' of '{path}' is {tensor.layout} on {tensor.device}, expected plain values")


def fit_names(found: Mapping[str, tuple[tuple[int, ...], str]], model: nn.Module, path: str | Path) -> dict[str, str]:
    """Our name -> the file's name, for all tensors of the model, out of what the file holds: name -> shape, type."""
    expected = model.state_dict()
    published = {published_name(name): name for name in expected}
    names: dict[str, str] = {}
    for given_name in found:
        ours = published.get(given_name, given_name)
        if ours in names:
            raise InputError(f"checkpoint '{path}' has one tensor under two names, {names[ours]!r} and {given_name!r}")
        names[ours] = given_name
    missing = [published_name(name) for name in expected if name not in names]
    if missing:
        raise InputError(
            f"checkpoint '{path}' lacks the tensor '{missing[0]}' ({len(missing)} missing, {len(found)} found)\n"
            f"expected {len(expected)} tensors; is it a checkpoint of another config?"
        )
    for name, given_name in names.items():
        if name not in expected:
            raise InputError(
                f"checkpoint '{path}' has the tensor {given_name!r}, which the model does not\n"
                "is it a checkpoint of another config?"
            )
        shape, dtype = found[given_name]
        if not dtype.startswith(("float", "bfloat")):
            raise InputError(f"tensor '{given_name}' of '{path}' has type {dtype}, expected floating point")
        fits = _resizable if name == "backbone.position" else tuple.__eq__
        wanted = tuple(expected[name].shape)
        if shape != wanted and not fits(shape, wanted):
            raise InputError(f"tensor '{given_name}' of '{path}' has shape {shape}, expected {wanted}")
    return names


def _resizable(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether these are positions of a square grid of another size."""
    if len(shape) != 3 or shape[::2] != wanted[::2] or shape[1] <= 3:
        return False
    return math.isqrt(shape[1] - 2) ** 2 == shape[1] - 2


def position_for(position: Tensor, shape: torch.Size) -> Tensor:
    """Positions learned at another picture size, resized."""
    if position.shape == shape:
        return position
    side = math.isqrt(shape[1] - 2)
    return torch.cat([position[:, :2], resize_position(position[:, 2:].float(), side, side)], dim=1)


def save_checkpoint(path: str | Path, tensors: Mapping[str, Tensor], config: Config, **facts: str) -> None:
    """Write a checkpoint whole or not at all; its metadata holds the config and whatever else is told as text."""
    # One metadata entry: safetensors writes several in an order that changes from run to run.
    metadata = {"mdm": json.dumps({"config": json.loads(config.to_json()), **facts}, sort_keys=True)}
    content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(Path(path), save(content, metadata))


def write_atomically(path: Path, content: bytes) -> None:
    """A temporary file beside the target, then a rename: a killed process leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
