"""The Mamba-2 scan by an operator that ONNX Runtime brings along: `com.microsoft::LinearAttention`.

For machines where our native library cannot be built: faster than the function body (`mdm bench ops` says how much).
The runtime has no onnx, so this is done to a file when an engine is built from it.

LinearAttention with update_rule "gated" is S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t^T S_t: with k = B, q = C,
v = x dt and g = dt A that is the scan. Its keys need not be spread over the heads of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import ModelProto, NodeProto, TensorProto, helper, shape_inference

from mdm.plugins.contract import DOMAIN, SSD_SCAN
from mdm.plugins.errors import InputError
from mdm.plugins.functions import Body, Value, attributes_of, whole_scan


def use_linear_attention(model: ModelProto) -> ModelProto:
    """A copy of the model in which LinearAttention computes every Mamba-2 scan; for ONNX Runtime only."""
    rewritten = ModelProto()
    rewritten.CopyFrom(model)
    graph = rewritten.graph
    known = [*graph.input, *graph.value_info, *shape_inference.infer_shapes(model).graph.value_info]
    dims = {info.name: [d.dim_value for d in info.type.tensor_type.shape.dim] for info in known}
    dims |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    types = {info.name: info.type.tensor_type.elem_type for info in known}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}

    nodes: list[NodeProto] = []
    for node in graph.node:
        if (node.domain, node.op_type) == (DOMAIN, SSD_SCAN.name):
            nodes += replacement(node, dims, types)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    kept = [f for f in rewritten.functions if (f.domain, f.name) != (DOMAIN, SSD_SCAN.name)]
    del rewritten.functions[:]
    rewritten.functions.extend(kept)
    if "com.microsoft" not in {opset.domain for opset in rewritten.opset_import}:
        rewritten.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return rewritten


def replacement(node: NodeProto, dims: Mapping[str, Sequence[int]], types: Mapping[str, int]) -> list[NodeProto]:
    """The nodes that compute what one MambaSsdScan node computes, with the same inputs and output."""
    body = Body(node.name or node.output[0])
    named = dict(zip((spec.name for spec in SSD_SCAN.present(attributes_of(node)["has"])), node.input, strict=True))
    heads, groups = _known(node, named, dims, "A", 0), _known(node, named, dims, "Bm", 2)

    def scan(body: Body, x: Value, dt: Value, A: Value, Bm: Value, C: Value) -> Value:
        packed = body.ints(0, 0, -1)
        # The state before the first token is written out: no node of ours has an empty-string input.
        start = body.zeros(body.dims(body.dim(Bm, 0), body.ints(heads), body.dim(Bm, 3), body.dim(x, 3)))
        y = body.LinearAttention(
            body.Reshape(C, packed),
            body.Reshape(Bm, packed),
            body.Reshape(body.Mul(x, body.Unsqueeze(dt, body.ints(-1))), packed),
            start,
            body.Mul(dt, A),
            outputs=2, domain="com.microsoft", q_num_heads=groups, kv_num_heads=heads, scale=1.0, update_rule="gated",
        )  # fmt: skip
        return body.Reshape(y, body.Shape(x))

    whole_scan(body, SSD_SCAN, named, types.get(named["x"], TensorProto.FLOAT), scan, node.output[0])
    return body.nodes


def _known(node: NodeProto, named: Mapping[str, str], dims: Mapping[str, Sequence[int]], name: str, axis: int) -> int:
    """A size that must be a number in the file: LinearAttention has its head counts as attributes."""
    shape = dims.get(named[name], [])
    if axis >= len(shape) or not shape[axis]:
        letter = next(spec.dims[axis] for spec in SSD_SCAN.inputs if spec.name == name)
        raise InputError(
            f"node '{node.name}': {letter} of its input '{named[name]}' is not a number in this file\n"
            "LinearAttention needs it: export with fixed widths, or use the function body"
        )
    return shape[axis]
