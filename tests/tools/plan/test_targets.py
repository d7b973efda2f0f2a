"""Which versions take a graph, by what is known of them and no more."""

from __future__ import annotations

import onnx.helper
import pytest

from mdm.tools.plan.targets import RELEASES, RUNTIMES, SINCE, TAKES, Asked, refused_types, verdicts

NAMES = [release.name for release in RELEASES]


def taken(asked: Asked) -> list[str]:
    return [one.takes for one in verdicts(asked) if one.target in NAMES]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Asked(20, 10), ["yes"] * 5),
        (Asked(20, 10, plugins=True), ["yes", "yes", "yes", "yes", "yes"]),
        (Asked(22, 10, plugins=True), ["not known", "not known", "yes", "yes", "yes"]),
        (Asked(25, 10), ["not known"] * 4 + ["yes"]),
        (Asked(26, 10), ["not known"] * 5),
        (Asked(8, 10), ["no"] * 5),
        (Asked(23, 10, operators={"Add", "RMSNormalization"}), ["no", "no", "yes", "yes", "yes"]),
        (Asked(20, 10, operators={"STFT"}), ["no", "yes", "yes", "yes", "yes"]),
    ],
)
def test_releases(asked: Asked, expected: list[str]) -> None:
    assert taken(asked) == expected
    assert verdicts(asked)[0].takes == "no"  # before 10.3


def test_the_reason_is_told() -> None:
    by_name = {one.target: one.why for one in verdicts(Asked(20, 10, True, {"STFT", "Add"}))}
    assert by_name[NAMES[0]] == "STFT came with 10.5"
    by_name = {one.target: one.why for one in verdicts(Asked(22, 10, True, {"Add"}))}
    assert by_name[NAMES[0]] == "the file's opset is 22, its notes name those to 20; JetPack 6.1 and 6.2 have 10.3"


@pytest.mark.parametrize(
    ("opset", "ir", "expected"),
    [(20, 10, "1.22"), (22, 10, "1.22"), (23, 10, "1.24.1"), (20, 11, "1.24.1"), (26, 10, "1.25")],
)
def test_onnx_runtime(opset: int, ir: int, expected: str) -> None:
    assert f"ONNX Runtime {expected} and later" in [one.target for one in verdicts(Asked(opset, ir))]


def test_what_is_newer_than_is_known_of() -> None:
    assert [one.takes for one in verdicts(Asked(27, 13)) if one.target == "ONNX Runtime"] == ["not known"]


def test_what_a_gpu_must_be() -> None:
    assert verdicts(Asked(20, 10))[-1].target == "GPU"
    assert verdicts(Asked(20, 10, True))[-1].why == "plugins: none before"
    assert verdicts(Asked(20, 10, True, types={"bfloat16"}))[-1].why == "plugins and bfloat16: none before"
    assert verdicts(Asked(20, 10, types={"bfloat16"}))[-1].target == "GPU of 8.0 and later"


def test_types_that_tensorrt_refuses() -> None:
    used = {
        "Relu": {"float16", "bool"},
        "Where": {"bool", "int64"},
        "Sin": {"int64", "float32"},
        "Mul": {"", "float64"},
    }
    assert refused_types(used) == ["Relu of bool", "Sin of int64"]


def test_operators_are_onnxs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name written wrong would refuse a graph: every one is ONNX's, but for three that ONNX has given up."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert {*TAKES} - known == {"ParametricSoftplus", "ImageScaler", "ScaledTanh"} - known
    assert {*SINCE} <= {*TAKES}
    assert sum(len(names.split()) for names in TAKES) == len(TAKES)


def test_versions_of_onnx() -> None:
    """What ONNX's own table of its versions says of those that ONNX Runtime has."""
    table = {row[0]: (row[1], row[2]) for row in onnx.helper.VERSION_TABLE}
    assert [(ir, opset) for _, ir, opset in RUNTIMES] == [table["1.17.0"], table["1.20.1"], table["1.21.0"]]
