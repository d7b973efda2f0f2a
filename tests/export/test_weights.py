"""Where weights lie: the finished files are read back by onnx and by the safetensors package, not by our own code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdm.export.graph import Graph
from mdm.export.precision import make_precision
from mdm.export.truth import Truth
from mdm.export.weights import CUT_BLOCKS, DERIVED, DTYPES, POSITION, WEIGHTS, Checkpoint, Stored, Weights
from mdm.reference import load_config, load_model
from mdm.reference.checkpoint import build_model, published_name
from mdm.reference.config import Config

State = dict[str, Tensor]
FAMILIES = pytest.mark.parametrize("family", ["dim", "mdm"])
HALVES = {"float16": "fp16", "bfloat16": "bf16"}
TYPES = pytest.mark.parametrize("kind", DTYPES)


@pytest.fixture(scope="session")
def random_state() -> Callable[[Config], State]:
    """All tensors of a model, none of them zero or one throughout."""

    def make(config: Config) -> State:
        draw = torch.Generator().manual_seed(4)
        shapes = {name: tensor.shape for name, tensor in build_model(config).state_dict().items()}
        return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}

    return make


@pytest.fixture
def saved(
    tmp_path: Path, tiny: Callable[..., dict[str, Any]], random_state: Callable[[Config], State]
) -> Callable[..., tuple[Checkpoint, State]]:
    """saved(kind="float16", published=True, **config changes): a checkpoint and the values it holds."""

    def make(kind: str = "float32", published: bool = False, suffix: str = ".safetensors", **changes: Any) -> Any:
        config = load_config(tiny(**changes))
        state = {name: tensor.to(DTYPES[kind]) for name, tensor in random_state(config).items()}
        named = {published_name(name) if published else name: tensor for name, tensor in state.items()}
        path = tmp_path / f"model{suffix}"
        save_file(named, path) if suffix == ".safetensors" else torch.save(named, path)
        return Checkpoint(path, config), state

    return make


def read_back(weights: Weights, wanted: Sequence[Stored], folder: Path) -> dict[str, np.ndarray]:
    """What onnx finds where a graph says that its weights lie."""
    folder.mkdir()
    g = Graph("part", weights, make_precision("fp32"), 22)
    for stored in wanted:
        g.stored_value(stored)
    g.output("y", g.input("x", "float32", [1]), [1])
    model = g.model()
    weights.copy(folder)
    weights.write_derived(folder)
    weights.place(model, g.stored)
    (folder / "part.onnx").write_bytes(model.SerializeToString())
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(folder / "part.onnx").graph.initializer}


def same(found: np.ndarray, expected: Tensor) -> bool:
    """Type, shape and bits."""
    kinds = found.dtype.name == str(expected.dtype).removeprefix("torch.")
    return kinds and found.shape == tuple(expected.shape) and found.tobytes() == bits(expected)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@FAMILIES
@TYPES
@pytest.mark.parametrize("published", [False, True])
def test_a_checkpoint_of_that_type_serves_as_it_is(
    family: str, kind: str, published: bool, saved: Callable[..., tuple[Checkpoint, State]], tmp_path: Path
) -> None:
    checkpoint, state = saved(kind, published, family=family)
    weights = Weights(checkpoint, kind)
    wanted = [weights.parameter(name, kind) for name in state]
    found = read_back(weights, wanted, tmp_path / "out")
    assert {stored.file for stored in wanted} == {WEIGHTS}
    assert found.keys() == state.keys()
    assert all(same(found[name], tensor) for name, tensor in state.items())
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == checkpoint.path.read_bytes()
    assert not (tmp_path / "out" / DERIVED).exists()


@FAMILIES
@TYPES
@pytest.mark.parametrize("wanted_kind", DTYPES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_of_another_type_is_converted(
    family: str, kind: str, wanted_kind: str, suffix: str,
    saved: Callable[..., tuple[Checkpoint, State]], tmp_path: Path,
) -> None:  # fmt: skip
    checkpoint, state = saved(kind, suffix=suffix, family=family)
    weights = Weights(checkpoint, wanted_kind)
    verbatim = kind == wanted_kind and suffix == ".safetensors"
    assert weights.verbatim == verbatim
    assert checkpoint.bulk_type == kind
    found = read_back(weights, [weights.parameter(name, wanted_kind) for name in state], tmp_path / "out")
    assert all(same(found[name], tensor.to(DTYPES[wanted_kind])) for name, tensor in state.items())
    assert (tmp_path / "out" / WEIGHTS).exists() == verbatim
    assert (tmp_path / "out" / DERIVED).exists() != verbatim


@pytest.mark.parametrize("kind", HALVES)
def test_islands_of_a_half_precision_checkpoint_are_widened(
    kind: str, saved: Callable[..., tuple[Checkpoint, State]], tmp_path: Path
) -> None:
    checkpoint, state = saved(kind, family="dim")
    weights = Weights(checkpoint, kind)
    islands = [name for name in state if "norm" in name]
    wanted = [weights.parameter(name, "float32" if name in islands else kind) for name in state]
    assert {s.key for s in wanted if s.file == DERIVED} == set(islands)
    found = read_back(weights, wanted, tmp_path / "out")
    assert all(same(found[n], tensor.float() if n in islands else tensor) for n, tensor in state.items())
    assert weights.derived_bytes == sum(4 * state[name].numel() for name in islands)


def test_a_few_tensors_of_another_type_do_not_cost_a_copy_of_all(
    saved: Callable[..., tuple[Checkpoint, State]], tiny: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """float32 norms in a float16 file, as trainers write them."""
    checkpoint, state = saved("float16", family="dim")
    mixed = {name: tensor.float() if "norm" in name else tensor for name, tensor in state.items()}
    save_file(mixed, checkpoint.path)
    weights = Weights(Checkpoint(checkpoint.path, load_config(tiny(family="dim"))), "float16")
    wanted = [weights.parameter(name, str(t.dtype).removeprefix("torch.")) for name, t in mixed.items()]
    assert weights.verbatim
    assert not weights.derived
    assert all(same(v, mixed[n]) for n, v in read_back(weights, wanted, tmp_path / "out").items())


@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_rows_are_a_part_of_the_bytes(
    kind: str, saved: Callable[..., tuple[Checkpoint, State]], tmp_path: Path
) -> None:
    checkpoint, state = saved("float16", family="dim")
    weights = Weights(checkpoint, "float16")
    parts = {
        "patch_out.weight": (3, 7),
        "backbone.class_token.weight": (0, 1),
        POSITION: (2, 18),
        "patch_out.bias": (1, 4),
    }
    wanted = [weights.parameter(name, kind, rows) for name, rows in parts.items()]
    found = read_back(weights, wanted, tmp_path / "out")
    for name, (start, end) in parts.items():
        whole = state[name].to(DTYPES[kind])
        part = whole[:, start:end] if name == POSITION else whole[start:end]
        assert same(found[f"{name}[{start}:{end}]"], part)


def test_length_is_that_of_the_values() -> None:
    stored = Stored("w", "float16", (1, 6, 5), WEIGHTS, "w")
    assert stored.length == 60
    part = stored.rows(2, 5)
    assert (part.name, part.shape, part.length, part.skip) == ("w[2:5]", (1, 3, 5), 30, 20)
    again = part.rows(1, 2)
    assert (again.shape, again.skip) == ((1, 1, 5), 30)
    assert Stored("b", "float32", (), WEIGHTS, "b").length == 4


def test_one_tensor_in_two_types_is_refused(saved: Callable[..., tuple[Checkpoint, State]]) -> None:
    weights = Weights(saved(family="dim")[0], "float16")
    weights.parameter("patch_out.bias", "float16")
    with pytest.raises(ValueError, match=r"'patch_out\.bias' is wanted as float32"):
        weights.parameter("patch_out.bias", "float32")


# -------------------------------------------------------------------------------------------------- positions


@FAMILIES
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_positions_at_another_size_are_the_references(
    family: str, factor: int, kind: str, saved: Callable[..., tuple[Checkpoint, State]],
    tiny: Callable[..., dict[str, Any]], tmp_path: Path,
) -> None:  # fmt: skip
    checkpoint, _ = saved(kind, family=family)
    size = tiny(family=family)["image_size"] * factor
    config = load_config(tiny(family=family, image_size=size))
    weights = Weights(checkpoint, kind)
    stored = weights.position(config.side)
    model = load_model(checkpoint.path, config)
    found = read_back(weights, [stored], tmp_path / "out")[stored.name]
    assert same(found, model.backbone.position.detach())
    ours = Truth(checkpoint, config).model(config.image_size).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_positions_at_the_own_size_are_the_checkpoints(saved: Callable[..., tuple[Checkpoint, State]]) -> None:
    checkpoint, _ = saved(family="dim")
    weights = Weights(checkpoint, "float32")
    assert weights.position(4) == weights.parameter(POSITION, "float32")
    assert weights.position(4, through=4) == weights.parameter(POSITION, "float32")


@pytest.mark.parametrize(("side", "through"), [(4, 8), (4, 12), (3, 6), (4, 6)])
def test_positions_through_another_size_are_resized_twice(
    side: int, through: int, saved: Callable[..., tuple[Checkpoint, State]], tmp_path: Path
) -> None:
    checkpoint, state = saved(family="dim")
    weights = Weights(checkpoint, "float32")
    stored, direct = weights.position(side, through=through), weights.position(side)
    found = read_back(weights, [stored, direct], tmp_path / "out")
    grid = state[POSITION][:, 2:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    for n in (through, side):
        grid = F.interpolate(grid, (n, n), mode="bilinear", align_corners=False)
    expected = torch.cat([state[POSITION][:, :2], grid.flatten(2).mT], dim=1)
    assert np.array_equal(found[stored.name], expected)
    assert not np.array_equal(found[stored.name], found[direct.name])  # it blurs them


# -------------------------------------------------------------------------------------------------------- cut


@FAMILIES
def test_a_cut_keeps_the_first_blocks_and_the_last(
    family: str, saved: Callable[..., tuple[Checkpoint, State]], tiny: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    checkpoint, state = saved(family=family, blocks=7)
    cut = checkpoint.cut(load_config(tiny(family=family, blocks=7)))
    config = load_config(tiny(family=family, blocks=CUT_BLOCKS))
    last = {name: name.replace("blocks.2.", "blocks.6.") for name in build_model(config).state_dict()}
    weights = Weights(cut, "float32")
    model = Truth(cut, config).model(config.image_size)
    assert all(tensor.equal(state[last[name]]) for name, tensor in model.state_dict().items())
    found = read_back(weights, [weights.parameter(name, "float32") for name in last], tmp_path / "out")
    assert all(same(values, state[last[name]]) for name, values in found.items())
    assert checkpoint.expected.keys() == state.keys()  # the whole one is as it was


# ------------------------------------------------------------------------------------------------ sound files


def test_derived_tensors_are_a_sound_file_of_equal_bytes(
    saved: Callable[..., tuple[Checkpoint, State]], tmp_path: Path
) -> None:
    checkpoint, _ = saved(family="dim")
    values = {
        "z.odd": torch.arange(3.0),
        "a.odd": torch.arange(5.0),
        "m": torch.ones(2, 3),
        "scalar": torch.tensor(2.5),
    }
    kinds = {"a.odd": "float16", "m": "float32", "scalar": "bfloat16", "z.odd": "float32"}
    made = []
    for order in (list(values), sorted(values)):
        weights = Weights(checkpoint, "float32")
        for name in order:
            weights.derive(name, tuple(values[name].shape), kinds[name], partial(values.get, name))
        folder = tmp_path / str(len(made))
        folder.mkdir()
        weights.write_derived(folder)
        made.append((folder / DERIVED).read_bytes())
    assert made[0] == made[1]
    found = load_file(folder / DERIVED)
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], values[name].to(DTYPES[kinds[name]])) for name in values)
    with safe_open(folder / DERIVED, "np") as file:
        assert sorted(file.keys()) == sorted(values)


def test_values_stand_at_multiples_of_their_size(
    saved: Callable[..., tuple[Checkpoint, State]], tmp_path: Path
) -> None:
    """The autoencoder's last bias, three halves, must not put all float32 behind it on odd addresses."""
    weights = Weights(saved(family="dim")[0], "float32")
    stored = [
        weights.derive("a", (3,), "float16", lambda: torch.ones(3)),
        weights.derive("b", (2,), "float32", lambda: torch.ones(2)),
    ]
    read_back(weights, stored, tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "part.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        at = {entry.key: entry.value for entry in tensor.external_data}
        size = 2 if tensor.data_type == onnx.TensorProto.FLOAT16 else 4
        assert int(at["offset"]) % size == 0, tensor.name


def test_a_wrong_shape_is_not_written(saved: Callable[..., tuple[Checkpoint, State]], tmp_path: Path) -> None:
    weights = Weights(saved(family="dim")[0], "float32")
    weights.derive("a", (3, 2), "float32", lambda: torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"'a' came out as \(2, 3\), expected \(3, 2\)"):
        weights.write_derived(tmp_path)


def test_a_pth_of_parameters_and_of_turned_tensors(
    saved: Callable[..., tuple[Checkpoint, State]], tiny: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """torch.save(dict(model.named_parameters())) keeps them parameters, and a transposed tensor stays so."""
    checkpoint, state = saved(suffix=".pth", family="dim")
    turned = {name: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor for name, tensor in state.items()}
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in turned.items()}, checkpoint.path)
    weights = Weights(Checkpoint(checkpoint.path, load_config(tiny(family="dim"))), "float32")
    found = read_back(weights, [weights.parameter(name, "float32") for name in state], tmp_path / "out")
    assert all(same(found[name], tensor) for name, tensor in state.items())
