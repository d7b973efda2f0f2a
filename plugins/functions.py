"""Our operators as ONNX functions: plain operators that any ONNX runtime can run, without our native library.

A function is made for one presence pattern (`has`), one activation type, one chunk size and one count of taps; batch,
length, channels, heads, groups and state are read from its inputs when it runs. Inside everything is float32.

Inner values carry the function's name as a prefix, because TensorRT puts them into one namespace with the graph's. The
constants of a Scan's body are Constant nodes, because TensorRT reads the initializers of a nested body as garbage.

Letters as in `contract.py`, and Q tokens in a chunk, c chunks, R heads or channels of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from mdm.plugins.contract import ACTIVATIONS, DOMAIN, OPERATORS, SHORT_CONV, SSD_SCAN, VERSION, Operator

OPSET = 20
TAPS = 4
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
Value = str  # the name of one
Step = Callable[..., tuple[Value, Value]]


class Body:
    """Nodes under construction: `body.Mul(a, b)` appends a node and returns the name of its output."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[NodeProto] = []

    def __getattr__(self, op_type: str) -> Callable[..., Value]:
        return partial(self.add, op_type)

    def add(self, op_type: str, *inputs: Value, outputs: int = 1, **attributes: Any) -> Value:
        """The first of the node's outputs; the others have names that nobody uses."""
        name = f"{self.prefix}_{len(self.nodes)}"
        names = [name, *(f"{name}_{place}" for place in range(1, outputs))]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=name, **attributes))
        return name

    def ints(self, *values: int) -> Value:
        return self.Constant(value_ints=list(values))

    def number(self, value: float) -> Value:
        return self.Constant(value_float=value)

    def dim(self, of: Value, axis: int) -> Value:
        """One dimension, as a tensor of one integer."""
        return self.Shape(of, start=axis, end=axis + 1)

    def dims(self, *sizes: Value) -> Value:
        return self.Concat(*sizes, axis=0)

    def sized(self, value: Value, shape: Value) -> Value:
        """Reshape to sizes that are computed. A 0 among them is a size: TensorRT warns where it might mean "keep"."""
        return self.Reshape(value, shape, allowzero=1)

    def zeros(self, shape: Value, value: float = 0.0) -> Value:
        return self.ConstantOfShape(shape, value=helper.make_tensor("value", TensorProto.FLOAT, [1], [value]))

    def scan(self, state: Value, read: Sequence[Value], ranks: Sequence[int], step: Step) -> Value:
        """step(body, state, one slice of each value read) -> (next state, y), along the first axis -> all y, stacked.

        `ranks` are those of the state, of each slice, and of y.
        """
        name = f"{self.prefix}_{len(self.nodes)}"
        inner = Body(f"{name}_body")
        inputs = [f"{inner.prefix}_in{place}" for place in range(1 + len(read))]
        outputs = step(inner, *inputs)

        def infos(values: Sequence[Value], ranks: Sequence[int]) -> list[ValueInfoProto]:
            pairs = zip(values, ranks, strict=True)
            return [helper.make_tensor_value_info(v, TensorProto.FLOAT, [None] * rank) for v, rank in pairs]

        node = helper.make_node(
            "Scan", [state, *read], [f"{name}_state", name], name=name, num_scan_inputs=len(read),
            body=helper.make_graph(
                inner.nodes, inner.prefix, infos(inputs, ranks[:-1]), infos(outputs, (ranks[0], ranks[-1]))
            ),
        )  # fmt: skip
        self.nodes.append(node)
        return name


def function_body(
    operator: Operator, has: int, dtype: str = "float32", chunk_size: int = 64, taps: int = TAPS, opset: int = OPSET
) -> FunctionProto:
    """The function that a node of this pattern calls where no native form is at hand."""
    if dtype not in ACTIVATIONS:
        raise ValueError(f"activations are {dtype!r}, expected one of: {', '.join(ACTIVATIONS)}")
    present = [spec.name for spec in operator.present(has)]
    body = Body(operator.name)
    if operator is SHORT_CONV:
        short_conv(body, TYPES[dtype], taps, *present)
    else:
        scan = partial(ssd, chunk_size=chunk_size) if operator is SSD_SCAN else selective
        whole_scan(body, operator, {name: name for name in present}, TYPES[dtype], scan, "y")
    return helper.make_function(DOMAIN, operator.name, present, ["y"], body.nodes, [helper.make_opsetid("", opset)])


def whole_scan(
    body: Body, operator: Operator, values: Mapping[str, Value], dtype: int, scan: Callable[..., Value], output: Value
) -> None:
    """Everything around the bare scan(body, x, step size, A, Bm, C): casts, step size, D skip, gate."""
    at = dict(values)
    if dtype != TensorProto.FLOAT:
        at |= {
            s.name: body.Cast(at[s.name], to=TensorProto.FLOAT)
            for s in operator.inputs
            if s.activation and s.name in at
        }
    x, step, A, Bm, C = (at[spec.name] for spec in operator.required)
    D, z, bias, mask = (at.get(spec.name) for spec in operator.optional)
    step = softplus(body, step if bias is None else body.Add(step, bias))
    if mask is not None:
        step = body.Mul(step, body.Unsqueeze(mask, body.ints(-1)))
    y = scan(body, x, step, A, Bm, C)
    if D is not None:
        y = body.Add(y, body.Mul(x, body.Unsqueeze(D, body.ints(-1)) if operator is SSD_SCAN else D))
    if z is not None:
        y = body.Mul(y, body.Mul(z, body.Sigmoid(z)))
    finish(body, y, values[operator.inputs[0].name], output)


def finish(body: Body, y: Value, like: Value, output: Value) -> None:
    """To the type of what came in: among half-precision nodes one may have been kept in float32."""
    body.nodes.append(helper.make_node("CastLike", [y, like], [output], name=f"{body.prefix}_y"))


def softplus(body: Body, v: Value) -> Value:
    """log(1 + e^v) = max(v, 0) + 2 atanh(s), s = e / (2 + e), e = exp(-|v|), atanh by a series good to 5e-9.

    ONNX Runtime's Softplus takes log(1 + e) as it stands and loses four digits where a model's steps lie (0.001).
    """
    two = body.number(2.0)
    e = body.Exp(body.Neg(body.Abs(v)))
    s = body.Div(e, body.Add(e, two))
    squared = body.Mul(s, s)
    p = body.number(0.2802445927)
    for coefficient in (0.2799914098, 0.4002169907, 0.6666641313, 2.0):
        p = body.Add(body.Mul(p, squared), body.number(coefficient))
    return body.Add(body.Relu(v), body.Mul(p, s))


def selective(body: Body, u: Value, delta: Value, A: Value, Bm: Value, C: Value) -> Value:
    """Mamba-1, one token after another. What needs no state is computed for all tokens before."""
    B, L, G, N = (body.dim(Bm, axis) for axis in range(4))
    R = body.Div(body.dim(u, 2), G)
    by_group = body.dims(B, L, G, R)
    A = body.sized(A, body.dims(G, R, N))
    start = body.zeros(body.dims(B, G, R, N))
    delta, inflow = body.sized(delta, by_group), body.sized(body.Mul(delta, u), by_group)

    def token(body: Body, h: Value, delta: Value, inflow: Value, B: Value, C: Value) -> tuple[Value, Value]:
        column = body.ints(3)
        a = body.Exp(body.Mul(body.Unsqueeze(delta, column), A))  # [B,G,R,N]
        added = body.Mul(body.Unsqueeze(inflow, column), B)  # [B,G,R,N]
        h = body.Add(body.Mul(a, h), added)
        return h, body.ReduceSum(body.Mul(h, C), column, keepdims=0)  # [B,G,R]

    # The tokens in front by Transpose nodes: with Scan's own axes ONNX Runtime 1.31 crashes on a batch of 0.
    delta, inflow, Bm, C = (body.Transpose(v, perm=[1, 0, 2, 3]) for v in (delta, inflow, Bm, C))
    # B and C become [L,B,G,1,N] out here: cast before the loop and unsqueezed in it, TensorRT cannot build them.
    Bm, C = (body.Unsqueeze(v, body.ints(3)) for v in (Bm, C))
    y = body.scan(start, [delta, inflow, Bm, C], (4, 3, 3, 4, 4, 3), token)  # [L,B,G,R]
    return body.sized(body.Transpose(y, perm=[1, 0, 2, 3]), body.Shape(u))


def ssd(body: Body, x: Value, dt: Value, A: Value, Bm: Value, C: Value, chunk_size: int) -> Value:
    """Mamba-2, chunk after chunk: matrix products inside (Mamba-2 paper, Listing 1)."""
    B, L, G, N = (body.dim(Bm, axis) for axis in range(4))
    H, P = body.dim(x, 2), body.dim(x, 3)
    R, Q = body.Div(H, G), body.ints(chunk_size)
    spare = body.Mod(body.Neg(L), Q)
    c = body.Div(body.Add(L, spare), Q)

    def chunks(v: Value, perm: Sequence[int], *sizes: Value) -> Value:
        """[B,L,...] -> [B,c,Q,sizes], permuted; the spare tokens are zero."""
        padded = body.Pad(v, body.dims(body.ints(0), spare), body.number(0.0), body.ints(1))
        return body.Transpose(body.sized(padded, body.dims(B, c, Q, *sizes)), perm=perm)

    x_c = chunks(body.Mul(x, body.Unsqueeze(dt, body.ints(-1))), (1, 0, 3, 4, 2, 5), G, R, P)  # [c,B,G,R,Q,P]
    l_c = chunks(body.Mul(dt, A), (1, 0, 3, 4, 2), G, R)  # [c,B,G,R,Q], log decays
    B_c = chunks(Bm, (1, 0, 3, 4, 2), G, N)  # [c,B,G,N,Q]
    C_c = chunks(C, (1, 0, 3, 2, 4), G, N)  # [c,B,G,Q,N]
    ones = body.zeros(body.dims(Q, Q), 1.0)
    upto = body.Trilu(ones, upper=0)  # [t,r]: r <= t
    before = body.Trilu(ones, body.Constant(value_int=-1), upper=0)  # [r,s]: s < r

    def chunk(body: Body, state: Value, x: Value, l: Value, B: Value, C: Value) -> tuple[Value, Value]:
        def cut(v: Value, axis: int, start: int) -> Value:
            return body.Slice(v, body.ints(start), body.ints(start + 1), body.ints(axis))

        head, column = body.ints(2), body.ints(4)
        # Log decays over (s, t], each a sum of its own: differences of one running sum would lose a weak decay
        # behind a strong one.
        # The constant stands at the right: one flat product, where at the left it would be broadcast.
        sums = body.MatMul(body.Mul(body.Unsqueeze(l, body.ints(3)), upto), before)  # [B,G,R,Qt,Qs]
        within = body.Mul(body.Exp(sums), upto)  # [B,G,R,Qt,Qs]
        weights = body.Mul(body.Unsqueeze(body.MatMul(C, B), head), within)  # [B,G,R,Qt,Qs]
        passed = body.Exp(body.Add(cut(sums, 4, 0), body.Unsqueeze(cut(l, 3, 0), column)))  # [B,G,R,Q,1]
        carried = body.Mul(body.MatMul(body.Unsqueeze(C, head), state), passed)  # [B,G,R,Q,P]
        y = body.Add(body.MatMul(weights, x), carried)
        to_end = body.Transpose(cut(within, 3, chunk_size - 1), perm=[0, 1, 2, 4, 3])  # [B,G,R,Q,1]
        added = body.MatMul(body.Unsqueeze(B, head), body.Mul(x, to_end))  # [B,G,R,N,P]
        return body.Add(body.Mul(state, cut(passed, 3, chunk_size - 1)), added), y

    y = body.scan(
        body.zeros(body.dims(B, G, R, N, P)), [x_c, l_c, B_c, C_c], (5, 5, 4, 4, 4, 5), chunk
    )  # [c,B,G,R,Q,P]
    y = body.Transpose(y, perm=[1, 0, 4, 2, 3, 5])  # [B,c,Q,G,R,P]
    y = body.sized(y, body.dims(B, body.Mul(c, Q), H, P))
    return body.Slice(y, body.ints(0), L, body.ints(1))


def short_conv(body: Body, dtype: int, taps: int, x: Value, weight: Value, bias: Value | None = None) -> None:
    """Tap by tap over the padded sequence. ONNX's own Conv would have the channels written down, in its `group`.

    On ONNX Runtime's CPU it takes 1.2 to 2.5 times as long as Conv between two transposes. One Gather of all windows
    is no faster and takes twice the memory.
    """
    u = x if dtype == TensorProto.FLOAT else body.Cast(x, to=TensorProto.FLOAT)  # [B,L,D]
    # One output for each tap, so that another K than the body's is an error.
    first = body.Split(body.Transpose(weight, perm=[1, 0]), body.ints(*[1] * taps), outputs=taps, axis=0)  # [1,D] each
    weights = [first, *(f"{first}_{k}" for k in range(1, taps))]
    time = body.ints(1)
    seen = body.Pad(u, body.ints(taps - 1, 0), body.number(0.0), time)  # [B,K-1+L,D]
    total = body.Mul(u, weights[-1])  # [B,L,D]
    if bias is not None:
        total = body.Add(total, bias)
    for k in range(taps - 1):
        slid = body.Slice(seen, body.ints(k), body.ints(k + 1 - taps), time)  # [B,L,D]
        total = body.Add(total, body.Mul(slid, weights[k]))
    finish(body, body.Mul(total, body.Sigmoid(total)), x, "y")


def operator_nodes(model: ModelProto) -> list[NodeProto]:
    """The nodes of our operators in a model, as far as they stand in its main graph."""
    return [node for node in model.graph.node if node.domain == DOMAIN and node.op_type in OPERATORS]


def attributes_of(node: NodeProto) -> dict[str, int]:
    """The integer attributes of such a node, those that are left out at their defaults."""
    written = {a.name: int(a.i) for a in node.attribute}
    return {name: written.get(name, default) for name, default in OPERATORS[node.op_type].attributes.items()}


def attach_functions(model: ModelProto, dtype: str = "float32") -> None:
    """Give a model the bodies that its nodes of our operators call."""
    patterns: dict[str, dict[str, int]] = {}
    for node in operator_nodes(model):
        written = attributes_of(node)
        if node.op_type == SHORT_CONV.name:
            written["taps"] = taps_of(node, model)
        if patterns.setdefault(node.op_type, written) != written:
            raise ValueError(
                f"node '{node.name}' is a {node.op_type} with {written}, another has {patterns[node.op_type]}: "
                "a file can hold one body for each operator"
            )
    opset = next(entry.version for entry in model.opset_import if not entry.domain)  # a function must have the same
    for name, written in patterns.items():
        model.functions.append(function_body(OPERATORS[name], **written, dtype=dtype, opset=opset))


def taps_of(node: NodeProto, model: ModelProto) -> int:
    """K of a short convolution, by its weight."""
    sizes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    sizes |= {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    found = sizes.get(node.input[1], [])
    if len(found) != 2 or not found[1]:
        raise ValueError(f"node '{node.name}': K of its weight '{node.input[1]}' is not a number in this file")
    return found[1]


def operator_model(
    operator: Operator, has: int, dtype: str = "float32", taps: int = TAPS, **attributes: Any
) -> ModelProto:
    """A model of one node and its body; dimensions are named by the contract's letters, only K is a number."""
    present = operator.present(has)

    def info(name: str, dims: str, activation: bool) -> ValueInfoProto:
        shape = [taps if letter == "K" else letter for letter in dims]
        return helper.make_tensor_value_info(name, TYPES[dtype if activation else "float32"], shape)

    node = helper.make_node(
        operator.name, [spec.name for spec in present], ["y"], name="node", domain=DOMAIN, has=has, **attributes
    )
    graph = helper.make_graph(
        [node],
        operator.torch_name,
        [info(spec.name, spec.dims, spec.activation) for spec in present],
        [info("y", operator.inputs[0].dims, True)],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    attach_functions(model, dtype)
    return model
