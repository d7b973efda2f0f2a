"""Every graph against the PyTorch model: both families, all sets of modalities, precisions and opsets; and planted
faults, which show that the comparison would see a mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from mdm.export import mixers, networks, orders, step
from mdm.export.graph import Graph, Value
from mdm.export.graphs import Built, build_graph, plan_graphs
from mdm.export.precision import make_precision
from mdm.export.truth import Point, Truth
from mdm.export.validate import check_file, measure, run_step_graph, session
from mdm.export.weights import Checkpoint, Weights
from mdm.plugins.errors import ParityError
from mdm.reference.checkpoint import build_model
from mdm.reference.config import PRESETS, Config, load_config
from mdm.runtime.schedule import make_schedule
from mdm.runtime.solver import solver_table

Figure = Callable[[str, float, float], None]
Tiny = Callable[..., dict[str, Any]]
ORACLE = Path(__file__).parent.parent / "data" / "dim-tiny-lateral"
ORACLE_CONFIG = {"family": "dim", "width": 64, "blocks": 9, "in_channels": 4, "image_size": 16, "classes": 10}

# name -> changes to the tiny config, precision, opset
CASES: dict[str, tuple[dict[str, Any], str, int]] = {
    "mdm": ({}, "fp32", 20),
    "mdm opset 23": ({}, "fp32", 23),
    "mdm opset 25": ({"blocks": 5}, "fp32", 25),
    "mdm fp16": ({}, "fp16", 20),
    "mdm two groups, padding rho": ({"groups": 2, "pad": 2, "padding": "rho"}, "fp32", 20),
    "mdm parallel": ({"scan": "parallel"}, "fp32", 20),
    "mdm parallel, selection": ({"scan": "parallel", "keep": 0.4}, "fp32", 20),
    "mdm selection": ({"keep": 0.4, "blocks": 5}, "fp32", 20),
    "mdm other orders": ({"scan_orders": "341/2", "blocks": 7}, "fp32", 20),
    "mdm parallel, other orders": ({"scan": "parallel", "scan_orders": "31/21"}, "fp32", 20),
    "mdm one text length": ({"text_lengths": [9]}, "fp32", 20),
    "mdm mamba1": ({"mixer": "mamba1"}, "fp32", 20),
    "mdm predicts eps and v": ({"predict_image": "eps", "predict_text": "v"}, "fp32", 20),
    "mdm other schedules": ({"schedule_image": {"kind": "sd"}, "schedule_text": {"kind": "sd"}}, "fp32", 20),
    "mdm vp-linear": ({"schedule_image": {"kind": "vp-linear"}, "schedule_text": {"kind": "vp-linear"}}, "fp32", 20),
    "dim": ({"family": "dim"}, "fp32", 20),
    "dim opset 25": ({"family": "dim", "blocks": 9}, "fp32", 25),
    "dim fp16": ({"family": "dim"}, "fp16", 20),
    "dim rho": ({"family": "dim", "padding": "rho"}, "fp32", 20),
    "dim wide": ({"family": "dim", "width": 528, "blocks": 5, "image_size": 4}, "fp32", 20),
}
LIMITS = {"fp32": 2e-5, "fp16": 1e-2}


def write_checkpoint(folder: Path, config: Config) -> Path:
    """A fresh model whose zeros and ones, and what else is all one value, vary a little."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(config)
        tensors = {
            name: tensor.detach() + (0.1 * torch.randn_like(tensor) if tensor.unique().numel() == 1 else 0)
            for name, tensor in model.state_dict().items()
        }
    path = folder / "weights-of-it.safetensors"
    save_file(tensors, path)
    return path


def write_graphs(
    folder: Path,
    path: Path,
    config: Config,
    precision: str = "fp32",
    opset: int = 20,
    sizes: tuple[int, ...] = (),
    upsample: tuple[int, ...] = (),
    fp32_layers: tuple[str, ...] = (),
) -> tuple[list[Built], Truth]:
    checkpoint, kinds = Checkpoint(path, config), make_precision(precision, fp32_layers)
    weights = Weights(checkpoint, kinds.activations)
    plan = plan_graphs(config, [config.image_size, *sizes], upsample)
    built = [build_graph(spec, config, weights, kinds, opset) for spec in plan]
    weights.copy(folder)
    weights.write_derived(folder)
    for one in built:
        weights.place(one.model, one.stored)
        (folder / f"{one.spec.name}.onnx").write_bytes(one.model.SerializeToString())
    return built, Truth(checkpoint, config)


def worst(folder: Path, built: list[Built], truth: Truth, limit: float) -> float:
    return max(m.error for m in measure(folder, [one.spec for one in built], truth.config, truth, limit))


@pytest.mark.parametrize("name", CASES)
def test_every_graph_agrees_with_the_model_at_three_points(
    name: str, tmp_path: Path, tiny: Tiny, figure: Figure
) -> None:
    changes, precision, opset = CASES[name]
    config = load_config(tiny(**changes))
    built, truth = write_graphs(tmp_path, write_checkpoint(tmp_path, config), config, precision, opset)
    assert len(built) == (3 if config.family == "dim" else 16)
    for one in built:
        check_file(tmp_path / f"{one.spec.name}.onnx")
    figure(f"graphs of {name}: worst difference", worst(tmp_path, built, truth, 1.0), LIMITS[precision])


def test_upsample_guidance(tmp_path: Path, tiny: Tiny, figure: Figure) -> None:
    config = load_config(tiny(family="dim", in_channels=4))
    built, truth = write_graphs(tmp_path, write_checkpoint(tmp_path, config), config, upsample=(2, 3))
    names = [one.spec.name for one in built]
    assert {"step_image_16_upsample2", "step_image_guided_24_upsample3"} < set(names)
    figure("graphs of upsample guidance: worst difference", worst(tmp_path, built, truth, 1.0), LIMITS["fp32"])


def test_other_picture_sizes(tmp_path: Path, tiny: Tiny, figure: Figure) -> None:
    """Each with the positions that the reference has when it is loaded at that size."""
    config = load_config(tiny())
    built, truth = write_graphs(tmp_path, write_checkpoint(tmp_path, config), config, sizes=(16, 40))
    assert {"step_joint_guided_16", "decode_image_40", "denoise_turn_40"} < {one.spec.name for one in built}
    assert "step_text_16" not in {one.spec.name for one in built}
    figure("graphs of other picture sizes: worst difference", worst(tmp_path, built, truth, 1.0), LIMITS["fp32"])


@pytest.mark.parametrize("family", ["dim", "mdm"])
def test_layers_kept_in_float32_by_a_pattern(family: str, tmp_path: Path, tiny: Tiny, figure: Figure) -> None:
    """One block of three, scan and all; with every block kept, only the VAE is left in half precision."""
    config = load_config(tiny(family=family))
    path = write_checkpoint(tmp_path, config)
    errors = []
    for pattern in ("backbone.blocks.1.*", "backbone.*"):
        built, truth = write_graphs(tmp_path, path, config, "fp16", fp32_layers=(pattern,))
        specs = [one for one in built if one.spec.role == "denoise"]
        for one in specs:
            check_file(tmp_path / f"{one.spec.name}.onnx")
        errors.append(worst(tmp_path, specs, truth, 1.0))
    figure(f"{family} fp16 with one block kept: worst difference", errors[0], LIMITS["fp16"])
    figure(f"{family} fp16 with all blocks kept: worst difference", errors[1], LIMITS["fp32"])
    assert errors[0] > 10 * errors[1]


def test_without_the_native_library_the_kept_layers_run_too(tmp_path: Path, tiny: Tiny) -> None:
    """By the function bodies: one body serves float16 nodes and a float32 one."""
    config = load_config(tiny())
    path = write_checkpoint(tmp_path, config)
    built, truth = write_graphs(tmp_path, path, config, "fp16", fp32_layers=("backbone.blocks.1.*",))
    spec = next(one.spec for one in built if one.spec.name == "denoise_joint")
    inputs = truth.inputs(spec, Point(2, 9))
    file = str(tmp_path / "denoise_joint.onnx")
    (plain,) = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, inputs)
    (native,) = session(Path(file)).run(None, inputs)
    np.testing.assert_allclose(plain, native, atol=1e-2 * np.abs(native).max())


# ------------------------------------------------------------------------------------------------- the DiM oracle


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graphs of the published network's record."""
    folder = tmp_path_factory.mktemp("oracle")
    write_graphs(folder, ORACLE / "state_dict.safetensors", load_config(ORACLE_CONFIG))
    return folder


def test_the_oracles_eps_from_checkpoint_to_onnx_runtime(oracle: Path, figure: Figure) -> None:
    io = {name: tensor.numpy() for name, tensor in load_file(ORACLE / "io.safetensors").items()}
    inputs = {"z": io["x"], "t": io["timestep"].astype(np.float32), "y": io["y"]}
    (eps,) = session(oracle / "denoise_image.onnx").run(None, inputs)
    figure("dim oracle, checkpoint to ONNX Runtime: eps", np.abs(eps - io["eps"]).max(), 2e-5)


def test_the_oracles_sampler_by_the_step_graph(oracle: Path, figure: Figure) -> None:
    record = load_file(ORACLE / "sampler_dpm_x0_steps6.safetensors")
    rows = solver_table([make_schedule("sd")], solver="dim", steps=6)
    z, y = record["z_init"].numpy(), record["y"].numpy()
    inputs = {"base": z, "y": y, "uncond_y": np.full_like(y, 10), "rows": rows.astype(np.float32),
              "guidance": np.full(len(z), float(record["cfg_scale"]), np.float32)}  # fmt: skip
    end = run_step_graph(oracle / "step_image_guided.onnx", {f"in.{name}": array for name, array in inputs.items()})
    truth = record["z_out"].numpy()
    figure("dim oracle, 6 steps by the step graph, relative", np.abs(end - truth).max() / np.abs(truth).max(), 1e-3)


# ------------------------------------------------------------------------------------------------- planted faults

Plant = Callable[[pytest.MonkeyPatch], None]


def columns_for_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(orders.Orders, "_rows", property(lambda self: self._columns))


def no_d_skip(patch: pytest.MonkeyPatch) -> None:
    plain = mixers.own_node
    patch.setattr(
        mixers, "own_node", lambda g, op, required, optional, **kw: plain(g, op, required, optional | {"D": None}, **kw)
    )


def guidance_the_other_way(patch: pytest.MonkeyPatch) -> None:
    plain = step.Step.guide

    def swapped(self: step.Step, halves: list[step.Half], t: Value, network: Any) -> Value:
        return plain(self, halves[::-1], t, network)

    patch.setattr(step.Step, "guide", swapped)


def x0_taken_for_v(patch: pytest.MonkeyPatch) -> None:
    plain = networks.mdm_estimate

    def estimate(g: Graph, config: Config, *rest: Any) -> Value:
        return plain(g, load_config(config.__dict__ | {"predict_text": "v"}), *rest)

    patch.setattr(step, "mdm_estimate", estimate)


def slots_shifted(patch: pytest.MonkeyPatch) -> None:
    names = list(step.ROW)
    names[5], names[6] = names[6], names[5]
    patch.setattr(step, "ROW", tuple(names))


def every_modality_is_the_picture(patch: pytest.MonkeyPatch) -> None:
    plain = Weights.parameter

    def parameter(self: Weights, name: str, dtype: str, rows: tuple[int, int] | None = None) -> Any:
        return plain(self, name, dtype, (0, 1) if name.endswith("modality.weight") else rows)

    patch.setattr(Weights, "parameter", parameter)


@pytest.mark.parametrize(
    "plant",
    [columns_for_rows, no_d_skip, guidance_the_other_way, x0_taken_for_v, slots_shifted, every_modality_is_the_picture],
)
def test_a_planted_fault_is_seen(plant: Plant, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(tiny(image_size=24, patch=4, blocks=7))
    path = write_checkpoint(tmp_path, config)
    plant(monkeypatch)
    built, truth = write_graphs(tmp_path, path, config)
    with pytest.raises(ParityError, match="computes something else than the model"):
        worst(tmp_path, built, truth, 1e-3)


# ------------------------------------------------------------------------------------------------ presets, blocks


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_valid_graphs(preset: str, tmp_path: Path) -> None:
    """Up to the checker, on a file of zeros that is all hole; `mdm bench export` times the largest."""
    from mdm.tools.bench.export import write_zeros

    config = load_config(preset)
    write_zeros(tmp_path / "zeros.safetensors", preset, "fp32")
    checkpoint, kinds = Checkpoint(tmp_path / "zeros.safetensors", config), make_precision("fp32")
    weights = Weights(checkpoint, kinds.activations)
    names = ("step_image_guided", "step_joint_guided")
    specs = [spec for spec in plan_graphs(config, [config.image_size], ()) if spec.name in names]
    built = [build_graph(spec, config, weights, kinds, 20) for spec in specs]
    weights.copy(tmp_path)
    weights.write_derived(tmp_path)
    for one in built:
        weights.place(one.model, one.stored)
        content = one.model.SerializeToString()
        assert len(content) < 5_000_000
        (tmp_path / f"{one.spec.name}.onnx").write_bytes(content)
        check_file(tmp_path / f"{one.spec.name}.onnx")


@pytest.mark.parametrize("preset", ["dim-small", "dim-huge-512"])
def test_three_blocks_of_a_dim_preset_agree(preset: str, tmp_path: Path, figure: Figure) -> None:
    config = load_config(PRESETS[preset] | {"blocks": 3})
    path = write_checkpoint(tmp_path, config)
    built, truth = write_graphs(tmp_path, path, config)
    specs = [one.spec for one in built if one.spec.name == "denoise_image"]
    found = max(m.error for m in measure(tmp_path, specs, config, truth, 1.0, count=1))
    figure(f"three blocks of {preset}: worst difference", found, 2e-5)


def counts(built: Built, prefix: str) -> dict[str, int]:
    kinds = [node.op_type for node in built.model.graph.node if node.name.startswith(prefix)]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


BLOCK = {"Add": 4, "Div": 1, "Gather": 1, "Mul": 3, "Pow": 1, "ReduceMean": 1, "Split": 1, "Sqrt": 1}
MAMBA1 = {"MambaSelectiveScan": 1, "MambaShortConv": 1, "MatMul": 4, "Split": 2, "Transpose": 4, "Unsqueeze": 2}
MAMBA2 = {"Add": 1, "Div": 1, "MambaShortConv": 1, "MambaSsdScan": 1, "MatMul": 2, "Mul": 1, "Pow": 1, "ReduceMean": 1,
          "Reshape": 5, "Split": 2, "Sqrt": 1, "Transpose": 2}  # fmt: skip


@pytest.mark.parametrize("family", ["dim", "mdm"])
def test_a_block_has_no_more_nodes_than_it_needs(family: str, tmp_path: Path, tiny: Tiny) -> None:
    """One gather between two blocks, no Expand, and no Transpose but of weights."""
    config = load_config(tiny(family=family, blocks=5))
    built, _ = write_graphs(tmp_path, write_checkpoint(tmp_path, config), config)
    graph = next(one for one in built if one.spec.name == "step_image_guided")
    mixer = MAMBA1 if family == "dim" else MAMBA2
    assert counts(graph, "backbone.blocks.1.mixers.") == mixer
    whole = counts(graph, "backbone.blocks.1.")
    assert whole == {kind: BLOCK.get(kind, 0) + mixer.get(kind, 0) for kind in sorted(BLOCK.keys() | mixer.keys())}
    names = [node.name for node in graph.model.graph.node]
    assert len(set(names)) == len(names)
    assert {"backbone.blocks.1.mixers.0.conv1d.conv", "backbone.blocks.1.mixers.0.scan"} <= set(names)


@pytest.mark.parametrize("family", ["dim", "mdm"])
def test_nothing_is_turned_or_spread_inside_a_mixer(family: str, tmp_path: Path, tiny: Tiny) -> None:
    """From the projections to the convolution, to the scan and behind it: only weights are."""
    config = load_config(tiny(family=family, blocks=3))
    built, _ = write_graphs(tmp_path, write_checkpoint(tmp_path, config), config)
    for one in built:
        makers = {output: node for node in one.model.graph.node for output in node.output}
        for node in one.model.graph.node:
            if node.name.startswith("backbone.blocks."):
                assert node.op_type != "Expand", node.name
            if node.op_type == "Transpose" and "mixers" in node.name:
                assert node.input[0].endswith(".weight"), node.name
            if node.op_type.startswith("Mamba"):
                assert all(makers[name].op_type != "Transpose" for name in node.input if name in makers)
                assert "" not in node.input


def test_guidance_doubles_the_batch_once(tmp_path: Path, tiny: Tiny) -> None:
    config = load_config(tiny())
    built, _ = write_graphs(tmp_path, write_checkpoint(tmp_path, config), config)
    by_name = {one.spec.name: counts(one, "backbone.") for one in built}
    assert by_name["step_joint_guided"] == by_name["step_joint"]
