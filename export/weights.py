"""Where every weight of the graphs lies: in the checkpoint's own bytes, or in a file of derived tensors.

`weights.safetensors` is the checkpoint itself, where that is a safetensors file of the type asked for; it is cloned or
copied by the kernel, never read into memory. What it does not hold as such (another type, another picture size, A out
of A_log) is computed tensor by tensor into `derived.safetensors`. Graphs point into both by offset.

The names of tensors are those of the PyTorch model, whatever they are called in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

from mdm.export.copy_file import copy_sparse
from mdm.plugins.errors import InputError
from mdm.reference.checkpoint import build_model, check_plain, fit_names, position_for, read_tensors
from mdm.reference.config import Config
from mdm.reference.dim import DiM
from mdm.reference.multimodal import MDM
from mdm.runtime.safetensors_header import Entry, read_array, read_header, write_header

POSITION = "backbone.position"
CUT_BLOCKS = 3  # one that sends no skip, one that sends, one that receives
WEIGHTS, DERIVED = "weights.safetensors", "derived.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True)
class Stored:
    """A tensor of the graphs: `shape` and `dtype` of what starts `skip` bytes into tensor `key` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    key: str
    skip: int = 0

    @property
    def length(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def rows(self, start: int, end: int) -> Stored:
        """Part of the first axis that is not 1: its bytes lie together."""
        axis = next(place for place, size in enumerate(self.shape) if size != 1)
        shape = (*self.shape[:axis], end - start, *self.shape[axis + 1 :])
        skip = start * math.prod(self.shape[axis + 1 :]) * DTYPES[self.dtype].itemsize
        return Stored(f"{self.name}[{start}:{end}]", self.dtype, shape, self.file, self.key, self.skip + skip)


@dataclass(frozen=True)
class Derived:
    """A tensor of `derived.safetensors`, made when it is written."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


class Checkpoint:
    """The file that is exported: names, shapes and types at once, values one tensor at a time."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        model = empty_model(config)
        self.expected = shapes_of(model)
        self._entries: dict[str, Entry] = {}
        self._tensors: dict[str, Tensor] = {}
        self.rounded: frozenset[str] = frozenset()
        if path.suffix == ".safetensors":
            self.format = "safetensors"
            if not path.is_file():
                raise InputError(f"checkpoint '{path}' is not a file")
            self._entries = read_header(path).tensors
            kinds = {kind: name for name, kind in SAFETENSORS.items()}
            found = {name: (e.shape, kinds.get(e.dtype, e.dtype)) for name, e in self._entries.items()}
        else:
            self.format = "pth"
            self._tensors = read_tensors(path, mapped=True)
            for name, tensor in self._tensors.items():
                check_plain(name, tensor, path)
            found = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in self._tensors.items()}
        self.file_name = fit_names(found, model, path)  # our name -> the file's
        self.found = {ours: found[theirs] for ours, theirs in self.file_name.items()}  # our name -> shape, type

    def entry(self, name: str) -> Entry:
        return self._entries[self.file_name[name]]

    def read(self, name: str) -> Tensor:
        """The values of a tensor, as the file has them."""
        theirs = self.file_name[name]
        if self.format == "pth":
            tensor = self._tensors[theirs]
        else:
            entry = self._entries[theirs]
            tensor = torch.from_numpy(read_array(self.path, entry))
            tensor = tensor.view(torch.bfloat16) if entry.dtype == "BF16" else tensor
        return tensor.to(torch.bfloat16) if name in self.rounded else tensor

    @property
    def bulk_type(self) -> str:
        """The type that most of the numbers have."""
        return max(sorted({kind for _, kind in self.found.values()}), key=self.share_of)

    def position(self, sides: Sequence[int]) -> Tensor:
        """The learned positions, resized to grids of these sides one after the other. float32 [1,2+side*side,E]"""
        position = self.read(POSITION).float()
        for side in sides:
            position = position_for(position, torch.Size((1, 2 + side * side, position.shape[2])))
        return position

    def cut(self, config: Config) -> Checkpoint:
        """The same file as a model of `CUT_BLOCKS` blocks: the first ones and the last."""
        other = copy(self)
        other.expected = shapes_of(empty_model(cut_config(config)))
        last = f"backbone.blocks.{CUT_BLOCKS - 1}."
        whole = {name: name.replace(last, f"backbone.blocks.{config.blocks - 1}.") for name in other.expected}
        other.file_name = {name: self.file_name[whole[name]] for name in other.expected}
        other.found = {name: self.found[whole[name]] for name in other.expected}
        return other

    def with_rounded(self, names: Collection[str]) -> Checkpoint:
        """The same with these tensors read as bfloat16 would have them."""
        other = copy(self)
        other.rounded = frozenset(names)
        return other

    def share_of(self, dtype: str) -> float:
        """How much of the file, by numbers, is of that type."""
        sizes = [(math.prod(shape), kind) for shape, kind in self.found.values()]
        return sum(size for size, kind in sizes if kind == dtype) / sum(size for size, _ in sizes)


def empty_model(config: Config) -> DiM | MDM:
    """Names and shapes without values."""
    with torch.device("meta"):
        return build_model(config)


def cut_config(config: Config) -> Config:
    return replace(config, blocks=CUT_BLOCKS)


def shapes_of(model: DiM | MDM) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class Weights:
    """What graphs ask for, and afterwards the two files."""

    def __init__(self, checkpoint: Checkpoint, activations: str, part: bool = False) -> None:
        """`part`: of a part of the checkpoint, whose weights alone are written instead of another copy of all."""
        self.checkpoint = checkpoint
        self.verbatim = not part and checkpoint.format == "safetensors" and checkpoint.share_of(activations) > 0.5
        self.derived: dict[str, Derived] = {}
        self._offsets: dict[str, int] = {}

    def parameter(self, name: str, dtype: str, rows: tuple[int, int] | None = None) -> Stored:
        """A tensor of the model in that type."""
        shape, found = self.checkpoint.found[name]
        if self.verbatim and found == dtype:
            stored = Stored(name, dtype, shape, WEIGHTS, name)
        else:
            stored = self.derive(name, shape, dtype, lambda: self.checkpoint.read(name))
        return stored if rows is None else stored.rows(*rows)

    def derive(self, key: str, shape: tuple[int, ...], dtype: str, make: Callable[[], Tensor]) -> Stored:
        known = self.derived.setdefault(key, Derived(dtype, shape, make))
        if (known.dtype, known.shape) != (dtype, shape):
            raise ValueError(f"'{key}' is wanted as {dtype} {shape} and as {known.dtype} {known.shape}")
        return Stored(key, dtype, shape, DERIVED, key)

    def value(self, stored: Stored) -> Tensor:
        """What a graph finds there, before it is rounded to the graph's type."""
        whole = self.derived[stored.key].make() if stored.file == DERIVED else self.checkpoint.read(stored.key)
        start = stored.skip // DTYPES[stored.dtype].itemsize
        return whole.flatten()[start : start + math.prod(stored.shape)].reshape(stored.shape)

    def position(self, side: int, through: int | None = None) -> Stored:
        """Learned positions for a grid of that side, float32 [1,2+side*side,E].

        `through`: resized to that side first and from there, as DiM's upsample guidance does; it blurs them.
        """
        name = POSITION
        shape = self.checkpoint.found[name][0]
        sides = [n for n in (through, side) if n is not None]
        if all(shape[1] == 2 + n * n for n in sides):
            return self.parameter(name, "float32")

        key = ".".join([name, *(f"{n}x{n}" for n in sides)])
        return self.derive(key, (1, 2 + side * side, shape[2]), "float32", lambda: self.checkpoint.position(sides))

    @property
    def derived_bytes(self) -> int:
        return sum(math.prod(d.shape) * DTYPES[d.dtype].itemsize for d in self.derived.values())

    def copy(self, folder: Path) -> None:
        """`weights.safetensors`, where the checkpoint serves as it is."""
        if self.verbatim:
            copy_sparse(self.checkpoint.path.resolve(), folder / WEIGHTS)

    def write_derived(self, folder: Path) -> None:
        """`derived.safetensors`, if there is anything to hold. It is never in memory as a whole."""
        entries: dict[str, Entry] = {}
        end = 0
        # The widest types first: every tensor then stands at a multiple of its type's size.
        for key in sorted(self.derived, key=lambda key: (-DTYPES[self.derived[key].dtype].itemsize, key)):
            derived = self.derived[key]
            length = math.prod(derived.shape) * DTYPES[derived.dtype].itemsize
            entries[key] = Entry(SAFETENSORS[derived.dtype], derived.shape, end, length)
            end += length
        if not entries:
            return
        header = write_header(entries)
        with open(folder / DERIVED, "wb") as file:
            file.write(header)
            for key, entry in entries.items():
                self._offsets[key] = len(header) + entry.offset
                derived = self.derived[key]
                tensor = derived.make().to(DTYPES[derived.dtype]).contiguous()
                if tuple(tensor.shape) != derived.shape:
                    raise ValueError(f"'{key}' came out as {tuple(tensor.shape)}, expected {derived.shape}")
                file.write(tensor.flatten().view(torch.uint8).numpy().data)

    def place(self, model: ModelProto, stored: dict[str, Stored]) -> None:
        """Tell a graph where its weights lie; after `write_derived`."""
        for tensor in model.graph.initializer:
            if tensor.name not in stored:
                continue
            at = stored[tensor.name]
            start = self.checkpoint.entry(at.key).offset if at.file == WEIGHTS else self._offsets[at.key]
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", at.file), ("offset", start + at.skip), ("length", at.length)):
                tensor.external_data.add(key=key, value=str(value))
