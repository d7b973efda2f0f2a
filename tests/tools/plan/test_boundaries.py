"""The edges of the plugins: types that are told, and faults that are found."""

from __future__ import annotations

from onnx import NodeProto, helper

from mdm.plugins.contract import SHORT_CONV, SSD_SCAN
from mdm.tools.plan.boundaries import Boundary, at_plugins
from mdm.tools.plan.tensors import Tensor

SIZES = {"B": 2, "L": 64, "H": 4, "P": 64, "G": 1, "N": 32}
HALF, FULL = "float16", "float32"


def scan(**attributes: int) -> NodeProto:
    return helper.make_node(
        "MambaSsdScan", [spec.name for spec in SSD_SCAN.required], ["y"], "scan", domain="mdm", **attributes
    )


def given(**changes: str | int) -> dict[str, Tensor]:
    """What a scan in float16 is given; a type or a size changed."""
    sizes = SIZES | {name: size for name, size in changes.items() if isinstance(size, int)}
    tensors = {
        spec.name: Tensor(
            str(changes.get(f"{spec.name}_type", HALF if spec.activation else FULL)), tuple(sizes[d] for d in spec.dims)
        )
        for spec in SSD_SCAN.required
    }
    return tensors | {"y": Tensor(str(changes.get("y_type", HALF)), tensors["x"].shape)}


def found(node: NodeProto, tensors: dict[str, Tensor]) -> tuple[list[str], int, int]:
    said: list[str] = []
    boundaries, room = at_plugins([node, node], tensors, said.append)
    return said, boundaries.total(), room


def test_types_and_workspace() -> None:
    boundaries, room = at_plugins([scan(), scan()], given(L=600), lambda said: None)
    takes = (("x", HALF), ("dt", HALF), ("A", FULL), ("Bm", HALF), ("C", HALF))
    assert boundaries == {Boundary("MambaSsdScan", takes, HALF): 2}
    # Of two samples in two segments: 4 x 64 x 32 states, and 8 sums of steps, which are counted for heads of 32.
    assert room == 4 * (2 * 2 * 4 * 64 * 32 + 2 * 2 * 8) + 128  # a multiple of 256
    assert found(scan(), given(L=600)) == ([], 2, room)
    assert found(scan(), given()) == ([], 2, 0)


def test_a_wrong_type_is_found_at_each_place() -> None:
    for name, wrong, expected in (
        ("A", HALF, "expected float32: TensorRT casts nothing by itself"),
        ("dt", FULL, "expected float16 as 'x' is: TensorRT casts nothing by itself"),
        ("C", "bfloat16", "expected float16 as 'x' is"),
        ("y", FULL, "expected float16 as 'x' is"),
    ):
        said, count, room = found(scan(), given(**{f"{name}_type": wrong}))
        assert said == [said[0]] * 2  # of two nodes
        assert said[0].startswith(f"MambaSsdScan: '{name}' is {wrong}, at node 'scan'\n{expected}")
        assert (count, room) == (2, 0)


def test_a_first_input_that_is_no_activation() -> None:
    said, _, _ = found(
        scan(), given(**{f"{i.name}_type": "int64" for i in SSD_SCAN.required if i.activation}, y_type="int64")
    )
    assert said[0] == (
        "MambaSsdScan: 'x' is int64, at node 'scan'\n"
        "expected one of float32, float16, bfloat16: TensorRT casts nothing by itself"
    )


def test_a_type_that_nobody_knows() -> None:
    said, _, _ = found(scan(), given() | {"Bm": Tensor("", None)})
    assert "'Bm' is of a type that is not known" in said[0]


def test_sizes_that_no_kernel_serves() -> None:
    said, _, room = found(scan(), given(N=8))
    assert said[0].startswith("MambaSsdScan: no GPU kernel for N = 8\nexpected one of 16, 32, 64, 128")
    assert room == 0
    assert "no GPU kernel for P = 20" in found(scan(), given(P=20))[0][0]
    assert "does not divide" in found(scan(), given(G=3))[0][0]


def test_sizes_that_only_a_run_knows_are_not_judged() -> None:
    tensors = given(N=8)
    assert found(scan(), {name: tensor._replace(shape=None) for name, tensor in tensors.items()}) == ([], 2, 0)


def test_inputs_that_the_attribute_does_not_name() -> None:
    said, count, _ = found(scan(has=1), given())
    assert "attribute 'has' is 1, which stands for 6 inputs" in said[0]
    assert count == 0
    assert "attribute 'has' is 99" in found(scan(has=99), given())[0][0]


def test_a_convolution_has_no_workspace() -> None:
    node = helper.make_node(SHORT_CONV.name, ["x", "w"], ["y"], domain="mdm")
    tensors = {"x": Tensor(HALF, (1, 9, 64)), "w": Tensor(FULL, (64, 4)), "y": Tensor(HALF, (1, 9, 64))}
    assert found(node, tensors) == ([], 2, 0)
