"""What a graph's nodes ask TensorRT for, read without onnx and held to what onnx reads."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from mdm.plugins.contract import SSD_SCAN
from mdm.plugins.errors import InputError
from mdm.plugins.functions import operator_model
from mdm.runtime.tensorrt.versions import UNTOLD
from mdm.tools.engines.asked import asks_for, check_plugins, without_functions

SCAN, CONV = ("MambaSsdScan", "1", "mdm"), ("MambaShortConv", "1", "mdm")
OPERATORS = {"mdm.MambaSsdScan": 2, "mdm.MambaShortConv": 1, "MatMul": 9}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three nodes: as exported, of another version, and without attributes; and what may stand around them."""
    made = operator_model(SSD_SCAN, 7, "float16")
    first = made.graph.node[0]
    first.attribute.extend(
        helper.make_attribute(*one) for one in (("plugin_version", "1"), ("plugin_namespace", "mdm"))
    )
    second, third = onnx.NodeProto(), onnx.NodeProto()
    second.CopyFrom(first)
    next(one for one in second.attribute if one.name == "plugin_version").s = b"2"
    third.CopyFrom(first)
    del third.attribute[:]
    third.attribute.extend([helper.make_attribute("alpha", 0.5), helper.make_attribute("many", [-1, 2**40])])
    made.graph.node.extend([second, third, helper.make_node("MatMul", ["a", "b"], ["c"])])
    onnx.save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_what_nodes_ask_for(model: Path) -> None:
    assert list(asks_for(model, "MambaSsdScan")) == [("1", "mdm"), ("2", "mdm"), ("1", "")]
    assert list(asks_for(model, "MatMul")) == [("1", "")]
    assert list(asks_for(model, "Mamba")) == []


def test_a_file_that_cannot_be_read_asks_for_nothing(model: Path, tmp_path: Path) -> None:
    """Cut anywhere, or with any byte changed near the nodes: at worst less is known."""
    assert list(asks_for(tmp_path / "none.onnx", "MambaSsdScan")) == []
    content, broken = model.read_bytes(), tmp_path / "broken.onnx"
    start = content.index(b"MambaSsdScan")
    for at in range(max(0, start - 200), min(len(content), start + 600)):
        for spoiled in (content[:at], content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]):
            broken.write_bytes(spoiled)
            list(asks_for(broken, "MambaSsdScan"))


def test_a_file_without_functions(model: Path) -> None:
    """All else as it was, to the byte."""
    content = onnx.load(model)
    assert len(content.functions) == 1
    assert without_functions(model.read_bytes()) != model.read_bytes()
    made = onnx.load_model_from_string(without_functions(model.read_bytes()))
    del content.functions[:]
    assert made == content
    assert without_functions(content.SerializeToString()) == content.SerializeToString()


def test_nodes_that_became_plugins(model: Path) -> None:
    assert check_plugins(OPERATORS, [SCAN, CONV, SCAN], [], model) == [CONV, SCAN]
    assert check_plugins({"MatMul": 3}, [], [], model) == []
    assert check_plugins(OPERATORS, [UNTOLD] * 3, [], model) == [CONV, SCAN]  # 10.3 does not tell which they are


@pytest.mark.parametrize(
    ("plugins", "said"),
    [
        ([SCAN, CONV], "1 of 2 nodes of operator 'MambaSsdScan'"),
        ([SCAN, SCAN], "1 of 1 nodes of operator 'MambaShortConv'"),
        ([UNTOLD] * 2, "2 of 2 nodes of operator 'MambaSsdScan'"),
        ([("Other", "1", "mdm")] * 3, "2 of 2 nodes of operator 'MambaSsdScan'"),
    ],
)
def test_nodes_that_did_not(model: Path, plugins: list[tuple[str, str, str]], said: str) -> None:
    there = [("MambaSsdScan", "3", "mdm"), ("MambaSsdScan", "1", ""), ("Other", "1", "")]
    with pytest.raises(InputError) as caught:
        check_plugins(OPERATORS, plugins, there, model)
    first, second, third = str(caught.value).splitlines()
    assert first == f"{said} find no plugin, and would run by their ONNX bodies"
    if "SsdScan" in said:
        assert second == (
            "the file asks for version '1' of namespace '' and version '1' of namespace 'mdm' and version '2' of "
            "namespace 'mdm'; registered: version '1' of namespace '' and version '3' of namespace 'mdm'"
        )
    else:
        assert second == "the file asks for one; registered: none of this name"
    assert third == "export the bundle again, or build with --bodies"
