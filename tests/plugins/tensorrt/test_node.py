"""A node's enqueue path without TensorRT: the interpreter's kernels on CPU memory, called as TensorRT would."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton")

import numpy as np
import torch
from torch import Tensor

from mdm.plugins.contract import OPERATORS, SSD_SCAN, Operator
from mdm.plugins.errors import InputError
from mdm.plugins.gpu import torch_launch
from mdm.plugins.gpu.torch_launch import LIMITS
from mdm.plugins.gpu.variants import Plan, choose
from mdm.plugins.tensorrt.node import Described, Node
from mdm.tools.bench.operator_inputs import operator_inputs

GUARD = 256  # bytes behind every buffer, which nothing may touch
MIN, OPT, MAX = (
    {"B": B, "L": L, "D": 64, "H": 2, "P": 32, "G": 1, "N": 16, "K": 4} for B, L in ((1, 3), (1, 35), (2, 70))
)


class OnCpu:
    """Stands where Scans does: plans as for an H200, and runs the kernels on the memory the pointers lead to."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[Operator, str, Mapping[str, int]]] = {}
        self.planned = 0

    def plan(self, operator: Operator, dtype: str, sizes: Mapping[str, int], has: int) -> Plan:
        self.planned += 1
        plan = choose(operator, dtype, sizes, has, 132, (9, 0))
        self.shapes[id(plan)] = operator, dtype, sizes
        return plan

    def run(self, plan: Plan, pointers: Mapping[str, int], stream: int = 0) -> None:
        assert {*pointers} >= {*plan.pointers}
        assert stream == 0x55
        operator, dtype, sizes = self.shapes[id(plan)]
        dims = {spec.name: spec.dims for spec in operator.inputs} | {"y": operator.inputs[0].dims}
        kinds = {spec.name: dtype if spec.activation else "float32" for spec in operator.inputs} | {"y": dtype}
        buffers = {
            name: tensor_at(pointers[name], [sizes[letter] for letter in dims[name]], kinds[name])
            for name in plan.pointers
            if name in dims
        }
        for name, shape in plan.scratch.items():
            buffers[name] = tensor_at(pointers[name], shape, "float32")
        for launch in plan.launches:
            torch_launch.run_launch(launch, buffers)


def tensor_at(address: int, shape: Any, dtype: str) -> Tensor:
    kind = getattr(torch, dtype)
    size = int(np.prod(shape)) * kind.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=kind).reshape(tuple(shape))


def guarded(size: int) -> Tensor:
    return torch.full((size + GUARD,), 0xAB, dtype=torch.uint8)


def describe(operator: Operator, sizes: Mapping[str, int], has: int, dtype: str) -> list[Described]:
    return [
        Described(tuple(sizes[letter] for letter in spec.dims), dtype if spec.activation else "float32")
        for spec in operator.present(has)
    ]


@pytest.mark.usefixtures("short_segments")
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("operator", [*OPERATORS.values()], ids=lambda operator: operator.torch_name)
def test_a_profiles_shapes(operator: Operator, dtype: str, exact: Any, off: Any, figure: Any) -> None:
    """Smallest, usual, largest, in turn and again: right, within the workspace, and planned once a shape."""
    has, scans, worst = operator.has_all, OnCpu(), 0.0
    node = Node(operator, has, lambda: scans)  # type: ignore[arg-type, return-value]
    workspace = guarded(node.workspace(describe(operator, MAX, has, dtype)))
    for sizes in (MIN, OPT, MAX, OPT, MIN):
        arrays = operator_inputs(operator, sizes, has, "float32", "typical")
        specs = operator.present(has)
        given = [
            torch.from_numpy(arrays[spec.name]).to(getattr(torch, dtype if spec.activation else "float32"))
            for spec in specs
        ]
        room = given[0].numel() * given[0].element_size()
        y = guarded(room)
        node.run(
            describe(operator, sizes, has, dtype), [value.data_ptr() for value in given], y.data_ptr(),
            workspace.data_ptr(), 0x55,
        )  # fmt: skip
        assert bool((y[room:] == 0xAB).all())
        assert bool((workspace[-GUARD:] == 0xAB).all())
        seen = {spec.name: value.float().numpy() for spec, value in zip(specs, given, strict=True)}
        found = y[:room].view(given[0].dtype).reshape(given[0].shape).double().numpy()
        worst = max(worst, float(off(found, exact(operator, seen))))
    assert scans.planned == 3
    figure(f"{operator.torch_name}, enqueue over a profile, {dtype}", worst, LIMITS[dtype])


@pytest.mark.parametrize("has", [0, 6, 15])
def test_types_and_layouts(has: int) -> None:
    """Every activation has the type of the first; parameters and the mask are float32; all are linear."""
    node, names = Node(SSD_SCAN, has), [spec.name for spec in SSD_SCAN.present(has)]
    for dtype in ("float32", "float16", "bfloat16"):
        right = [*describe(SSD_SCAN, OPT, has, dtype), Described((1, 35, 2, 32), dtype)]
        assert all(node.takes(place, right) for place in range(len(right)))
        for place, name in enumerate([*names, "y"]):
            for other in {"float32", "float16", "bfloat16", ""} - {right[place].dtype}:
                wrong = [*right]
                wrong[place] = Described(right[place].dims, other)
                may = place == 0 and other != ""  # the first says what the others are
                assert node.takes(place, wrong) is may, (name, other)
            tiled = [*right]
            tiled[place] = Described(right[place].dims, right[place].dtype, linear=False)
            assert not node.takes(place, tiled)
        assert not node.takes(0, right[:-1])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(InputError, match="MambaSsdScan: attribute 'has' is 16, expected a sum of"):
        Node(SSD_SCAN, 16)
    node, inputs = Node(SSD_SCAN, 1), describe(SSD_SCAN, OPT, 1, "float16")
    with pytest.raises(InputError, match="'has' is 1, which stands for 6 inputs\nfound 5, expected x, dt, A, Bm, C, D"):
        node.prepare(inputs[:-1])
    with pytest.raises(InputError, match="MambaSsdScan: input 'dt' has H = 3, 'x' has 2"):
        node.prepare([inputs[0], Described((1, 35, 3), "float16"), *inputs[2:]])
    with pytest.raises(InputError, match="MambaSsdScan: no GPU kernel for N = 48\nexpected one of 16, 32, 64, 128"):
        node.check(describe(SSD_SCAN, OPT | {"N": 48}, 1, "float16"))
