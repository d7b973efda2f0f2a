"""For our operators: a session over one node, the float64 definition it is held to, and the cases it is tried on.

The cases are a pairwise covering: every two values of two of the axes meet in some case.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto

from mdm.plugins import library, register
from mdm.plugins.contract import SHORT_CONV, SSD_SCAN, Operator
from mdm.tools.bench.operator_inputs import DECAYS, Arrays, operator_inputs

# tools/sanitize brings its own build of the library.
if "MDM_TEST_SCAN_LIBRARY" in os.environ:
    library.cpu_library_path = lambda: Path(os.environ["MDM_TEST_SCAN_LIBRARY"])

Array = NDArray[Any]
Case = dict[str, Any]

LIMITS = {"float32": 3e-6, "float16": 2e-3}  # of max |error| / max |value|
AXES: dict[str, tuple[Any, ...]] = {
    "L": (1, 2, 15, 63, 64, 65, 274, 1064, 4160),
    "N": (16, 64, 128),
    "P": (32, 64),
    "G": (1, 2, 8),
    "has": tuple(range(16)),
    "decay": DECAYS,
    "B": (1, 0, 5),
    "dtype": tuple(LIMITS),
}
CONV_AXES: dict[str, tuple[Any, ...]] = {
    "L": (1, 2, 3, 4, 5, 127, 128, 131, 1064),  # 128 tokens are an item of the native form, which takes four at a time
    "D": (1, 7, 16, 67, 512, 521, 1100),  # and 512 channels
    "K": (1, 2, 3, 4, 5, 9),
    "has": (0, 1),
    "B": (1, 0, 5),
    "dtype": tuple(LIMITS),
}
OpenSession = Callable[..., onnxruntime.InferenceSession]


def open_session(model: ModelProto, native: bool = False, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised; a second copy on stderr helps nobody
    if native:
        register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def definition(operator: Operator, inputs: Arrays) -> Array:
    """In float64, in numpy: shares no line with any form it judges."""
    return convolution(inputs) if operator is SHORT_CONV else recurrence(operator, inputs)


def convolution(inputs: Arrays) -> Array:
    """Each channel of each sample by numpy's own convolution, the taps turned."""
    x, weight = inputs["x"].astype(np.float64), inputs["weight"].astype(np.float64)
    total = np.zeros_like(x) + inputs.get("bias", np.zeros(1)).astype(np.float64)
    for b, d in np.ndindex(x.shape[0], x.shape[2]):
        total[b, :, d] += np.convolve(x[b, :, d], weight[d, ::-1])[: x.shape[1]]
    return total / (1 + np.exp(-total))


def recurrence(operator: Operator, inputs: Arrays) -> Array:
    """A scan, one token after another."""
    x, step, A, Bm, C = (inputs[spec.name].astype(np.float64) for spec in operator.required)
    D, z, bias, mask = (
        None if (v := inputs.get(spec.name)) is None else v.astype(np.float64) for spec in operator.optional
    )
    step = np.logaddexp(0, step if bias is None else step + bias)
    if mask is not None:
        step = step * mask[..., None]
    ssd, groups = operator is SSD_SCAN, Bm.shape[2]
    # Both scans as one: [B,L,G,R] scalars and [B,L,G,R,P] values, P = 1 for Mamba-1; A [G,R,1,N].
    B, L = x.shape[:2]
    R = x.shape[2] // groups
    x = x.reshape(B, L, groups, R, x.shape[-1] if ssd else 1)
    dt = step.reshape(B, L, groups, R)
    A = A.reshape(groups, -1, 1, 1 if ssd else A.shape[1])
    state = np.zeros((*x.shape[:1], *x.shape[2:], Bm.shape[3]))  # [B,G,R,P,N]
    y = np.zeros_like(x)
    for t in range(L):
        decay = np.exp(dt[:, t, :, :, None, None] * A)
        state = decay * state + (dt[:, t, ..., None] * x[:, t])[..., None] * Bm[:, t, :, None, None]
        y[:, t] = (state * C[:, t, :, None, None]).sum(-1)
    if D is not None:
        y += D.reshape(groups, -1, 1) * x
    y = y.reshape(inputs[operator.inputs[0].name].shape)
    return y if z is None else y * z / (1 + np.exp(-z))


def relative_error(y: Array, expected: Array) -> float:
    """max |error| / max |value|; 0 for equal arrays, even if they are all zero or empty."""
    error = np.abs(y.astype(np.float64) - expected).max(initial=0)
    return float(error and error / np.abs(expected).max(initial=0))


@pytest.fixture(scope="session")
def session() -> OpenSession:
    return open_session


@pytest.fixture(scope="session")
def exact() -> Callable[[Operator, Arrays], Array]:
    return definition


@pytest.fixture(scope="session")
def off() -> Callable[[Array, Array], float]:
    return relative_error


def pairwise(axes: dict[str, tuple[Any, ...]]) -> list[Case]:
    """Of fifty random cases with a pair that is still missing, the one with the most missing pairs, until none is."""
    rng = random.Random(0)
    pairs = itertools.combinations(axes, 2)
    missing = {((a, x), (b, y)) for a, b in pairs for x, y in itertools.product(axes[a], axes[b])}
    cases = []
    while missing:
        pair = dict(min(missing, key=repr))
        tries = [{name: rng.choice(values) for name, values in axes.items()} | pair for _ in range(50)]
        best = max(tries, key=lambda case: len(missing & set(itertools.combinations(case.items(), 2))))
        missing -= set(itertools.combinations(best.items(), 2))
        cases.append(best)
    return cases


CASES, CONV_CASES = pairwise(AXES), pairwise(CONV_AXES)


def sizes_of(case: Case) -> dict[str, int]:
    """Heads and channels of a scan few enough that the recurrence follows 4160 tokens in a second."""
    if "K" in case:
        return {name: case[name] for name in "BLDK"}
    heads, channels = {1: 3, 2: 4, 8: 8}[case["G"]], case["P"] * (1 if case["L"] > 1064 else 3)
    return {name: case[name] for name in "BLGNP"} | {"H": heads, "D": channels}


@pytest.fixture(scope="session")
def hold() -> Callable[..., None]:
    """Hold a form of an operator to the definition in every case; record its worst errors."""

    def check(name: str, operator: Operator, open_form: Callable[[Case, Arrays], Any], figure: Any) -> None:
        worst, cases = dict.fromkeys(LIMITS, 0.0), CONV_CASES if operator is SHORT_CONV else CASES
        for case in cases:
            inputs = operator_inputs(operator, sizes_of(case), case["has"], case["dtype"], case.get("decay", ""))
            form = open_form(case, inputs)
            if form is None:
                continue
            expected, y = definition(operator, inputs), form.run(None, inputs)[0]
            assert (y.shape, y.dtype) == (expected.shape, case["dtype"])
            error = relative_error(y, expected)
            assert error <= LIMITS[case["dtype"]], f"{case}: {error:.3g}"
            worst[case["dtype"]] = max(worst[case["dtype"]], error)
        for dtype, error in worst.items():
            figure(f"{operator.torch_name}, {name}, {dtype}: worst of {len(cases)} cases", error, LIMITS[dtype])

    return check


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU kernels: segments of 16 tokens and more, so that short sequences have several."""
    monkeypatch.setattr("mdm.plugins.gpu.variants.UNIT", 16)
    monkeypatch.setattr("mdm.plugins.gpu.variants.SHORTEST", 16)
