"""The level of the operators: sound forms pass, planted faults fail, and the part that is at fault is named."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mdm.plugins.contract import DOMAIN, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN
from mdm.runtime.bundle import open_bundle
from mdm.runtime.ort import OrtBackend
from mdm.tools.check.finding import Array, Finding, Verdict, worst_of
from mdm.tools.check.levels import operators
from mdm.tools.check.levels.operators import (
    LONG,
    WORK,
    cases_of,
    check_operators,
    convolution,
    recurrence,
    rounded,
)  # fmt: skip
from mdm.tools.check.limits import Multiples
from mdm.tools.check.nodes.sessions import BODY, forms_on

MULTIPLES = Multiples()
# Mamba-2 with groups and a mask; Mamba-1; and the first in half precision.
BUNDLES: dict[str, tuple[dict[str, Any], str]] = {
    "ssd": ({"keep": 0.5, "groups": 2}, "fp32"),
    "selective": ({"family": "dim"}, "fp32"),
    "half": ({"keep": 0.5, "groups": 2}, "fp16"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., dict[str, Any]]) -> Callable[[str], Path]:
    @cache
    def make(name: str) -> Path:
        import torch
        from safetensors.torch import save_file

        from mdm.export import export_bundle
        from mdm.reference import SHIPPED_TOKENIZER, build_model, load_config

        changes, precision = BUNDLES[name]
        config, folder = tiny(**changes), tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_file(build_model(load_config(config)).state_dict(), folder / "model.safetensors")
        options = {"tokenizer": SHIPPED_TOKENIZER} if config["family"] == "mdm" else {}
        return export_bundle(
            folder / "model.safetensors", config, folder / "made.bundle", precision=precision, validate=False, **options
        )

    return make


def backend_of(folder: Path) -> OrtBackend:
    return OrtBackend(open_bundle(folder), threads=1)


def verdicts(findings: list[Finding]) -> dict[str, Verdict]:
    parts = dict.fromkeys(finding.part for finding in findings)
    return {part: worst_of(one.verdict for one in findings if one.part == part) for part in parts}


@pytest.mark.parametrize("name", BUNDLES)
def test_twenty_seeds_pass(
    name: str, bundle: Callable[[str], Path], figure: Callable[[str, float, float], None]
) -> None:
    found = list(check_operators(backend_of(bundle(name)), MULTIPLES, range(20)))
    assert {one.verdict for one in found} == {Verdict.PASS}
    scan = "MambaSelectiveScan (D, z, delta_bias)" if name == "selective" else "MambaSsdScan (D, z, dt_bias, mask)"
    cases = {scan: 5, "MambaShortConv (bias)": 4}  # of a seed; a convolution has no long decay
    assert {one.subject for one in found} == set(cases)
    for subject, part in itertools.product(cases, verdicts(found)):
        used = [one.used or 0 for one in found if (one.subject, one.part) == (subject, part)]
        assert len(used) == 20 * cases[subject]
        figure(f"{subject}, {name}, {part}: share of the limit, 20 seeds", max(used), 0.8)


class Faulty(OrtBackend):
    """A backend one of whose operators sees one input as something else."""

    def __init__(self, folder: Path, operator: str, name: str, change: Callable[[Array], Array]) -> None:
        super().__init__(open_bundle(folder), threads=1)
        self.operator, self.input, self.change = operator, name, change

    def session(self, content: bytes, subject: str, operators: Any) -> Any:
        true, change, name = super().session(content, subject, operators), self.change, self.input
        if not subject.startswith(self.operator):
            return true

        class Session:
            def run(self, wanted: Any, inputs: dict[str, Array]) -> Any:
                return true.run(wanted, inputs | {name: np.ascontiguousarray(change(inputs[name]))})

        return Session()


UNGATED = 1.2784645  # silu of it is 1
FAULTS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "D is dropped": ("D", np.zeros_like),
    "the gate is missing": ("z", lambda z: np.full_like(z, UNGATED)),
    "groups are swapped": ("Bm", lambda v: v[:, :, ::-1]),
    "groups of C are swapped": ("C", lambda v: v[:, :, ::-1]),
    "the bias is forgotten": ("dt_bias", np.zeros_like),
    "the mask is ignored": ("mask", np.ones_like),
    "a decay is off by a thousandth": ("A", lambda A: A * 1.001),
    "heads are shifted": ("dt", lambda v: np.roll(v, 1, axis=2)),
    "the last token sees no input": ("x", lambda x: np.concatenate([x[:, :-1], 0 * x[:, -1:]], axis=1)),
    "the result is not finite": ("z", lambda z: np.full_like(z, np.nan)),
}
CONV_FAULTS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "taps are turned": ("weight", lambda weight: weight[:, ::-1]),
    "the convolution's bias is forgotten": ("bias", np.zeros_like),
    "channels are shifted": ("weight", lambda weight: np.roll(weight, 1, axis=0)),
    "a token sees the next one": ("x", lambda x: np.roll(x, -1, axis=1)),
    "a tap is off by a thousandth": ("weight", lambda weight: weight * np.float32([1, 1.001, 1, 1])),
}


@pytest.mark.parametrize(
    ("operator", "fault"),
    [*((SSD_SCAN.name, fault) for fault in FAULTS), *((SHORT_CONV.name, fault) for fault in CONV_FAULTS)],
)
def test_a_fault_of_the_backend_fails(operator: str, fault: str, bundle: Callable[[str], Path]) -> None:
    backend = Faulty(bundle("ssd"), operator, *(FAULTS | CONV_FAULTS)[fault])
    found = list(check_operators(backend, MULTIPLES, [0]))
    first, *others = forms_on(backend, operators.subjects_of(backend.bundle)[0].used, has_body=True)
    its = [one for one in found if one.subject.startswith(operator)]
    assert verdicts(its) == {first: Verdict.FAIL, **dict.fromkeys(others, Verdict.PASS)}
    assert {one.verdict for one in found if one not in its} == {Verdict.PASS}
    said = next(one.said for one in found if one.verdict is Verdict.FAIL)
    assert said.startswith("y[")
    assert ", expected " in said


def spoiled(folder: Path, to: Path, change: Callable[[bytes], bytes]) -> Path:
    """A copy with every graph changed and signed anew."""
    shutil.copytree(folder, to)
    manifest = json.loads((to / "manifest.json").read_bytes())
    for name in manifest["graphs"]:
        content = change((to / f"{name}.onnx").read_bytes())
        (to / f"{name}.onnx").write_bytes(content)
        manifest["files"][f"{name}.onnx"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


def test_a_broken_body_is_told_from_a_broken_library(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    def without_gate(content: bytes) -> bytes:
        model = onnx.load_model_from_string(content)
        for function in model.functions:
            for node in function.node:
                node.op_type = "Tanh" if node.op_type == "Sigmoid" else node.op_type
        return model.SerializeToString()

    backend = backend_of(spoiled(bundle("ssd"), tmp_path / "spoiled", without_gate))
    found = verdicts(list(check_operators(backend, MULTIPLES, [0])))
    assert found.pop(BODY) is Verdict.FAIL
    assert set(found.values()) <= {Verdict.PASS}


def test_a_body_that_does_not_load_fails(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    def unknown(content: bytes) -> bytes:
        model = onnx.load_model_from_string(content)
        for function in model.functions:
            function.node[0].op_type = "NoSuchOperator"
        return model.SerializeToString()

    found = list(check_operators(backend_of(spoiled(bundle("ssd"), tmp_path / "b", unknown)), MULTIPLES, [0]))
    faults = [one for one in found if one.verdict is Verdict.FAIL]
    assert len(faults) == 2  # scan and convolution
    assert all(fault.part == BODY and "NoSuchOperator" in fault.said for fault in faults)


def test_a_body_of_each_kind_is_checked(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """Graphs may have different bodies: one that is wrong in a single graph is found."""
    changed: list[bytes] = []

    def only_first(content: bytes) -> bytes:
        model = onnx.load_model_from_string(content)
        if not model.functions or changed:
            return content
        changed.append(content)
        node = next(node for node in model.functions[0].node if node.op_type == "Sigmoid")
        node.op_type = "Tanh"
        return model.SerializeToString()

    backend = backend_of(spoiled(bundle("selective"), tmp_path / "b", only_first))
    assert len(operators.subjects_of(backend.bundle)) == 3  # the scan, and two convolutions
    assert verdicts(list(check_operators(backend, MULTIPLES, [0])))[BODY] is Verdict.FAIL


def test_a_file_that_is_no_graph_fails(bundle: Callable[[str], Path], tmp_path: Path) -> None:
    backend = backend_of(spoiled(bundle("selective"), tmp_path / "b", lambda content: b"nothing"))
    (found,) = check_operators(backend, MULTIPLES, [0])
    assert found.verdict is Verdict.FAIL
    assert "is not an ONNX file" in found.said


def test_without_onnx_it_is_skipped(bundle: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "find_spec", lambda name: None)
    (found,) = check_operators(backend_of(bundle("ssd")), MULTIPLES, [0])
    assert (found.verdict, "onnx" in found.said) == (Verdict.SKIPPED, True)


# ------------------------------------------------------------------------------------------------ the definition


def test_two_tokens_by_hand() -> None:
    softplus = [math.log1p(math.exp(v)) for v in (0.3 - 1, 0.7 - 1)]
    tokens = {"x": [2, -3], "Bm": [0.5, 4], "C": [1.5, -0.25], "z": [1, -2]}
    values = {name: np.array(value, np.float64).reshape(1, 2, 1, 1) for name, value in tokens.items()}
    values |= {"A": np.array([-0.9]), "D": np.array([0.6]), "dt_bias": np.array([-1.0])}
    values |= {"dt": np.array([0.3, 0.7]).reshape(1, 2, 1)}
    first = softplus[0] * 2 * 0.5
    second = math.exp(-0.9 * softplus[1]) * first + softplus[1] * -3 * 4
    silu = [1 / (1 + math.exp(-1)), -2 / (1 + math.exp(2))]
    expected = [(1.5 * first + 0.6 * 2) * silu[0], (-0.25 * second + 0.6 * -3) * silu[1]]
    assert recurrence(SSD_SCAN, values, np.float64).ravel() == pytest.approx(expected, abs=1e-14)

    masked = recurrence(SSD_SCAN, values | {"mask": np.array([[1.0, 0.0]])}, np.float64)  # the state stays as it is
    assert masked.ravel() == pytest.approx([expected[0], (-0.25 * first + 0.6 * -3) * silu[1]], abs=1e-14)


def test_a_convolution_by_hand() -> None:
    values = {"x": np.array([[[2.0], [-3.0]]]), "weight": np.array([[7.0, 0.5, 4.0]]), "bias": np.array([1.0])}
    totals = np.array([1 + 4 * 2.0, 1 + 0.5 * 2 + 4 * -3.0])  # the first tap meets no token
    assert convolution(values, np.float64).ravel() == pytest.approx(totals / (1 + np.exp(-totals)), abs=1e-14)
    bare = convolution({name: values[name] for name in ("x", "weight")}, np.float64).ravel()
    assert bare == pytest.approx((totals - 1) / (1 + np.exp(1 - totals)), abs=1e-14)


def test_mamba1_of_equal_decays_is_mamba2() -> None:
    """With A the same for all of N, each channel is a head of width 1."""
    draw = np.random.default_rng(0)
    B, L, D, N, G = 2, 9, 6, 5, 3
    u, delta, z = (draw.normal(size=(B, L, D)) for _ in range(3))
    Bm, C = (draw.normal(size=(B, L, G, N)) for _ in range(2))
    A, skip, bias = -draw.uniform(0.1, 2, D), draw.normal(size=D), draw.normal(size=D)
    one = {"u": u, "delta": delta, "A": np.repeat(A[:, None], N, 1), "Bm": Bm, "C": C, "D": skip, "z": z}
    two = {"x": u[..., None], "dt": delta, "A": A, "Bm": Bm, "C": C, "D": skip, "z": z[..., None]}
    y1 = recurrence(SELECTIVE_SCAN, one | {"delta_bias": bias}, np.float64)
    y2 = recurrence(SSD_SCAN, two | {"dt_bias": bias}, np.float64)
    assert y1 == pytest.approx(y2[..., 0], abs=1e-12)


def test_bfloat16_is_rounded_as_torch_does() -> None:
    import torch

    x = np.random.default_rng(0).normal(size=4000).astype(np.float32) * 10.0 ** np.arange(-20, 20).repeat(100)
    x = np.concatenate([x, np.arange(1, 2, 2**-9)]).astype(np.float32)  # and the ties
    assert np.array_equal(rounded(x, "bfloat16"), torch.from_numpy(x).bfloat16().float().numpy())


@pytest.mark.parametrize(("width", "seeds"), [(128, 1), (128, 20), (1024, 1), (4096, 50)])
def test_the_work_is_bounded(width: int, seeds: int) -> None:
    config = {"expand": 2, "width": width, "state": 128}
    cases = cases_of(config, range(seeds), scans=1)
    long = max(case.length for case in cases)
    tokens = sum(case.length for case in cases if case.length == long)
    assert long % 2
    assert LONG[0] <= long <= LONG[1]
    assert long == LONG[0] or tokens * 2 * width * 128 <= 1.02 * WORK
    assert {case.seed for case in cases} == set(range(seeds))
    assert any(case.long_decay for case in cases)


def test_operators_are_found_by_their_domain(bundle: Callable[[str], Path]) -> None:
    found = operators.subjects_of(open_bundle(bundle("ssd")))
    assert [(one.operator, one.has, one.node.domain) for one in found] == [
        (SHORT_CONV, 1, DOMAIN),
        (SSD_SCAN, 15, DOMAIN),
    ]
