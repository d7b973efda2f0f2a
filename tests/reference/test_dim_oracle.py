"""DiM against the published network: its outputs, every block's stream, and one run of its sampler.

`data/dim-tiny-lateral` holds random weights, inputs and intermediates of the published code at a small size. Planted
faults show that the comparison would see a mistake. The other padding, "rho", is checked cell by cell.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mdm.reference import backbone
from mdm.reference.backbone import Backbone, resize_position
from mdm.reference.checkpoint import load_model
from mdm.reference.config import config_from_dict
from mdm.reference.dim import DiM
from mdm.reference.guidance import classifier_free
from mdm.reference.order import Layout, palindrome
from mdm.reference.schedule import make_schedule
from mdm.reference.solvers import sample

Figure = Callable[[str, float, float], None]
DATA = Path(__file__).parent.parent / "data" / "dim-tiny-lateral"
TINY: dict[str, Any] = {
    "family": "dim", "width": 64, "blocks": 9, "in_channels": 4, "image_size": 16, "patch": 2, "classes": 10
}  # fmt: skip
LAYOUT = Layout(prefix=5, text=0, height=11, width=11)
torch.set_num_threads(1)


def load() -> DiM:
    model = load_model(DATA / "state_dict.safetensors", TINY)
    assert isinstance(model, DiM)
    return model


def largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


@torch.no_grad()
def eps_error(model: DiM) -> float:
    io = load_file(DATA / "io.safetensors")
    return largest(model(io["x"], io["timestep"], io["y"]) - io["eps"])


def test_eps(figure: Figure) -> None:
    figure("dim oracle: eps", eps_error(load()), 1e-5)


def test_every_block(figure: Figure) -> None:
    """The true stream behind block i is out + residual of the record, in that block's order."""
    model, oracle = load(), load_file(DATA / "intermediates.safetensors")
    streams: list[Tensor] = []
    mixed: list[tuple[Tensor, Tensor]] = []
    for block in model.backbone.blocks:
        assert isinstance(block, backbone.Block)
        block.register_forward_hook(lambda module, inputs, output: streams.append(output))
        block.mixers[0].register_forward_hook(lambda module, inputs, output: mixed.append((inputs[0], output)))
    eps_error(model)
    assert len(streams) == len(mixed) == 9
    worst = {"stream": 0.0, "mixer input": 0.0, "mixer output": 0.0}
    for i, stream in enumerate(streams):
        order = LAYOUT.joint_order([1, 2, 3, 4][palindrome(i, 9, 4)])
        expected = oracle[f"block{i}.out"] + oracle[f"block{i}.residual"]
        worst["stream"] = max(worst["stream"], largest(stream[:, order] - expected))
        for part, name in enumerate(("mixer input", "mixer output")):
            key = f"block{i}.{name.replace(' ', '_').replace('put', '')}"
            if key in oracle:
                worst[name] = max(worst[name], largest(mixed[i][part] - oracle[key]))
    assert sum("mixer" in key for key in oracle) == 12
    for name, error in worst.items():
        figure(f"dim oracle: {name} of every block", error, 1e-4)


def test_the_modulation_and_both_ends(figure: Figure) -> None:
    model, oracle = load(), load_file(DATA / "intermediates.safetensors")
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, inputs, output: seen.__setitem__(name, output)

    model.patch_in.register_forward_hook(keep("patch_embed"))
    model.backbone.modulation.register_forward_hook(keep("adaln_mod"))
    model.backbone.norm_out.register_forward_hook(keep("norm_out"))
    eps_error(model)
    seen["patch_embed"] = seen["patch_embed"].flatten(2).mT
    seen["norm_out"] = seen["norm_out"].flatten(1, 2)
    for name, value in seen.items():
        figure(f"dim oracle: {name}", largest(value - oracle[name]), 1e-5)


@torch.no_grad()
def run_sampler(model: DiM) -> tuple[Tensor, list[float]]:
    """DiM's own setting with 6 evaluations and guidance towards the record's classes."""
    record = load_file(DATA / "sampler_dpm_x0_steps6.safetensors")
    schedule, times = make_schedule("sd"), []

    def asked(z: Tensor, t: Tensor) -> Tensor:
        times.append(float(t))
        return model(z, schedule.model_time(t).expand(2), record["y"])

    def unasked(z: Tensor, t: Tensor) -> Tensor:
        return model(z, schedule.model_time(t).expand(2))

    guided = classifier_free(asked, unasked, float(record["cfg_scale"]))
    return sample("dim", guided, record["z_init"], schedule, 6), times


def test_a_whole_run(figure: Figure) -> None:
    record = load_file(DATA / "sampler_dpm_x0_steps6.safetensors")
    z, times = run_sampler(load())
    figure("dim oracle: 6 sampler steps, relative", largest(z - record["z_out"]) / largest(record["z_out"]), 1e-3)
    assert len(times) == 6
    figure("dim oracle: times of the calls", largest(torch.tensor(times) - record["t_calls"]), 1e-6)


# ---------------------------------------------------------------------------------------------- planted faults


def swap_orders(model: DiM, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.backbone.blocks[3], "image_orders", [1, 2, 3, 3])


def swap_cos_and_sin(model: DiM, patch: pytest.MonkeyPatch) -> None:
    whole = backbone.sinusoid
    patch.setattr(backbone, "sinusoid", lambda t, width: whole(t, width).roll(width // 2, -1))


def swap_shift_and_scale_of_blocks(model: DiM, patch: pytest.MonkeyPatch) -> None:
    for block in model.backbone.blocks:
        block.modulation.data = block.modulation.data[[1, 0, 2]]  # type: ignore[operator,union-attr,index]
    model.backbone.modulation.register_forward_hook(
        lambda module, inputs, output: output.unflatten(-1, (3, -1))[:, [1, 0, 2]].flatten(1)
    )


def swap_shift_and_scale_at_the_end(model: DiM, patch: pytest.MonkeyPatch) -> None:
    model.backbone.modulation_out.register_forward_hook(lambda module, inputs, output: output.roll(64, -1))


def first_skip_first(model: DiM, patch: pytest.MonkeyPatch) -> None:
    """FIFO: block mid gets what block 1 sent."""
    sent: list[Tensor] = []
    for index, block in enumerate(model.backbone.blocks):
        if 1 <= index < 5:
            block.register_forward_hook(lambda module, inputs, output: sent.append(output))
        elif index >= 5:
            block.register_forward_pre_hook(lambda module, inputs: (*inputs[:4], sent.pop(0)))


def pad_by_rows_of_the_other_schedule(model: DiM, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.backbone, "config", config_from_dict({**TINY, "padding": "rho"}))


def swap_class_tables(model: DiM, patch: pytest.MonkeyPatch) -> None:
    tables = model.backbone.class_embed, model.backbone.class_token
    model.backbone.class_token, model.backbone.class_embed = tables


def turn_the_convolution(model: DiM, patch: pytest.MonkeyPatch) -> None:
    conv = model.backbone.conv_in.weight
    conv.data = conv.data.mT.contiguous()


@pytest.mark.parametrize(
    "plant",
    [
        swap_orders, swap_cos_and_sin, swap_shift_and_scale_of_blocks, swap_shift_and_scale_at_the_end,
        first_skip_first, pad_by_rows_of_the_other_schedule, swap_class_tables, turn_the_convolution,
    ],
)  # fmt: skip
def test_a_planted_fault_shows(
    plant: Callable[[DiM, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred times the limit that the sound network keeps."""
    model = load()
    plant(model, monkeypatch)
    error = eps_error(model)
    print(f"{plant.__name__}: {error:.2g}")
    assert error > 1e-3


def test_without_guidance_or_with_another_solver_the_run_ends_elsewhere() -> None:
    record = load_file(DATA / "sampler_dpm_x0_steps6.safetensors")
    model = load()
    schedule = make_schedule("sd")

    def asked(z: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return model(z, schedule.model_time(t).expand(2), record["y"])

    for solver in ("dim", "dpmpp_2m"):
        z = sample(solver, asked, record["z_init"], schedule, 6)
        assert largest(z - record["z_out"]) / largest(record["z_out"]) > 3e-3


# ------------------------------------------------------------------------------------------ padding, other sizes


@pytest.mark.parametrize("padding", ["lateral", "rho"])
def test_padding_cell_by_cell(padding: str) -> None:
    """3 x 4 cells and P = 3, by the facts 1.3.5: token k at pad column k of each row; row H + k is token k throughout
    ("lateral"), or the bottom 3 x 7 cells in reading order take the tokens by turns ("rho")."""
    torch.manual_seed(0)
    config = config_from_dict({**TINY, "padding": padding, "width": 8, "blocks": 1})
    net = Backbone(config)
    image = torch.randn(2, 3, 4, 8)
    padded = net.pad_grid(image)
    assert padded.shape == (2, 6, 7, 8)
    token = [net.pad[0, :, k] for k in range(3)]
    for row in range(6):
        for column in range(7):
            if row < 3 and column < 4:
                expected = image[:, row, column]
            elif row < 3:
                expected = token[column - 4].expand(2, -1)
            elif padding == "lateral":
                expected = token[row - 3].expand(2, -1)
            else:
                expected = token[((row - 3) * 7 + column) % 3].expand(2, -1)
            assert torch.equal(padded[:, row, column], expected), (row, column)


@torch.no_grad()
def test_another_square_size_resizes_the_positions_at_run_time() -> None:
    """What a model loaded at that size computes, where the resize happens at load."""
    small, large = load(), load_model(DATA / "state_dict.safetensors", {**TINY, "image_size": 24})
    x, t = torch.randn(2, 4, 24, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 700.0])
    assert torch.equal(small(x, t), large(x, t))


@pytest.mark.parametrize(("height", "width"), [(12, 12), (4, 4), (6, 10), (16, 8), (24, 8)])
def test_every_other_grid_resizes_the_positions(height: int, width: int) -> None:
    """Also one that is twice as high as wide: DiM has no stacked pictures."""
    net = load().backbone
    expected = resize_position(net.position[:, 2:], height, width).view(1, height, width, 64)
    torch.testing.assert_close(net.grid_position(height, width), expected, rtol=0, atol=0)
