"""Level "operators": each of our operators in a bundle alone, at its widths there, against its definition in float64.

The definitions below go token by token, or tap by tap, and share no line with the forms they judge: the native library,
and the function body in the bundle's own graphs. Inputs are numbers that the deployed type holds, so the truth sees
what the backend sees; the floor is the definition in float32, its result rounded to the deployed type.

Letters as in `plugins/contract.py`: B batch, L length, D channels, H heads, P head width, N state, G groups, K taps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from mdm.plugins.contract import DOMAIN, OPERATORS, SCANS, SHORT_CONV, SSD_SCAN, Operator
from mdm.plugins.errors import MdmError, in_one_line
from mdm.runtime.backend import Backend
from mdm.runtime.bundle import Bundle
from mdm.runtime.ort import engine_errors
from mdm.tools.check.finding import Array, Finding, Verdict, difference
from mdm.tools.check.limits import Multiples
from mdm.tools.check.nodes.sessions import BODY, forms_on, session_on

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto, NodeProto
LEVEL = "operators"
TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of activations, by precision
STEPS = ("delta", "dt")  # a scan's input
SHORT = (1, 37, 65)  # one token, an odd number, one past the edge of a chunk
LONG = (129, 1063)  # at least past two edges; at most, as far as WORK goes
WORK = 2e8  # tokens times values of state in all long cases: 3 ns each at large widths, 20 at small ones or Mamba-1


@dataclass(frozen=True)
class Subject:
    """An operator as the bundle's graphs have it."""

    operator: Operator
    has: int
    node: NodeProto  # one of those
    body: FunctionProto | None
    model: ModelProto  # where they are

    @property
    def used(self) -> list[str]:
        """What a model of it alone is made of, in the manifest's words."""
        return [f"{DOMAIN}.{self.operator.name}"]

    @property
    def name(self) -> str:
        return f"{self.operator.name} ({', '.join(spec.name for spec in self.operator.present(self.has) if spec.bit)})"


@dataclass(frozen=True)
class Case:
    length: int
    batch: int
    long_decay: bool
    seed: int

    def __str__(self) -> str:
        return f"length {self.length}, {'long decay, ' if self.long_decay else ''}seed {self.seed}"


def check_operators(backend: Backend, multiples: Multiples, seeds: Sequence[int]) -> Iterator[Finding]:
    if find_spec("onnx") is None:
        reason = "the Python module onnx is not installed, which a model of one operator is made with"
        yield Finding(LEVEL, LEVEL, "", "", Verdict.SKIPPED, reason)
        return
    try:
        subjects = subjects_of(backend.bundle)
    except (MdmError, ValueError) as error:  # a graph that was changed, or is none
        yield failed(LEVEL, "", "", error)
        return
    scans = [subject for subject in subjects if subject.operator in SCANS]
    cases = cases_of(backend.bundle.manifest["config"], seeds, len(scans))
    for subject in subjects:
        its = cases if subject in scans else [case for case in cases if not case.long_decay]
        yield from check_one(backend, multiples, subject, its)


def check_one(backend: Backend, multiples: Multiples, subject: Subject, cases: Sequence[Case]) -> Iterator[Finding]:
    manifest = backend.bundle.manifest
    dtype, sizes = TYPES[manifest["precision"]], sizes_of(manifest["config"])
    content = one_node(subject, dtype)
    forms = {}
    for part in forms_on(backend, subject.used, subject.body is not None):
        try:
            forms[part] = session_on(backend, content, subject.name, subject.used, by_body=part == BODY)
        except MdmError as error:
            yield failed(subject.name, part, "", error)
    for case in cases:
        inputs = drawn(subject, {**sizes, "B": case.batch, "L": case.length}, dtype, case)
        truth = definition(subject.operator, inputs, np.float64)
        floor = difference(rounded(definition(subject.operator, inputs, np.float32), dtype), truth)
        limits = multiples.limits(floor, dtype)
        for part, session in forms.items():
            try:
                with engine_errors(subject.name):
                    found = session.run(None, inputs)[0]
                off = difference(found, truth)
            except (MdmError, ValueError) as error:  # it does not run, or comes out in another shape
                yield failed(subject.name, part, str(case), error)
                continue
            passed = limits.used(off) <= 1
            said = "" if passed else f"y{list(off.at)} is {off.found:.6g}, expected {off.truth:.6g}"
            verdict = Verdict.PASS if passed else Verdict.FAIL
            yield Finding(LEVEL, subject.name, part, str(case), verdict, said, truth.shape, off, floor, limits)


def failed(subject: str, part: str, case: str, error: Exception) -> Finding:
    return Finding(LEVEL, subject, part, case, Verdict.FAIL, in_one_line(error))


# --------------------------------------------------------------------------------------------------- what there is


def subjects_of(bundle: Bundle) -> list[Subject]:
    """The different operators of all graphs: by attributes, and by the body in their file."""
    from onnx import load_model_from_string

    from mdm.plugins.functions import attributes_of, operator_nodes

    found: dict[Any, Subject] = {}
    for name in bundle.manifest["graphs"]:
        content = bundle.graph_bytes(name)
        try:
            model = load_model_from_string(content)
        except Exception as error:  # protobuf's own class
            raise ValueError(f"graph '{name}' is not an ONNX file: {error}") from error
        bodies = {function.name: function for function in model.functions if function.domain == DOMAIN}
        for node in operator_nodes(model):
            attributes, body = attributes_of(node), bodies.get(node.op_type)
            key = node.op_type, *attributes.values(), body and body.SerializeToString(deterministic=True)
            OPERATORS[node.op_type].present(attributes["has"])
            found.setdefault(key, Subject(OPERATORS[node.op_type], attributes["has"], node, body, model))
    return list(found.values())


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    inner, state, taps = config["expand"] * config["width"], config["state"], config["conv"]
    if config["mixer"] == "mamba1":
        return {"D": inner, "N": state, "G": 1, "K": taps}
    heads, groups = inner // config["head"], config["groups"]
    mixed = inner + 2 * groups * state  # what the convolution sees: x, B and C
    return {"H": heads, "P": config["head"], "N": state, "G": groups, "D": mixed, "K": taps}


def cases_of(config: Mapping[str, Any], seeds: Sequence[int], scans: int) -> list[Case]:
    state = config["expand"] * config["width"] * config["state"]
    least, most = LONG
    long = int(min(max(WORK / (2 * state * len(seeds) * max(1, scans)), least), most)) | 1
    cases = []
    for seed in seeds:
        cases += [Case(length, 2, False, seed) for length in SHORT]
        cases += [Case(long, 1, long_decay, seed) for long_decay in (False, True)]
    return cases


def one_node(subject: Subject, dtype: str) -> bytes:
    """A model of it alone. It takes and gives float32, whatever the operator does: numpy has no bfloat16."""
    from onnx import NodeProto, TensorProto, helper

    from mdm.plugins.functions import TYPES as NUMBERS

    present = subject.operator.present(subject.has)
    infos = [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, list(spec.dims)) for spec in present]
    casts = [
        helper.make_node("Cast", [spec.name], [f"{spec.name}_"], to=NUMBERS[dtype])
        for spec in present
        if spec.activation
    ]
    node = NodeProto()
    node.CopyFrom(subject.node)
    node.ClearField("input")
    node.ClearField("output")
    node.input.extend(f"{spec.name}_" if spec.activation else spec.name for spec in present)
    node.output.append("y_")
    back = helper.make_node("Cast", ["y_"], ["y"], to=TensorProto.FLOAT)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(present[0].dims))
    graph = helper.make_graph([*casts, node, back], subject.operator.torch_name, infos, [y])
    model = helper.make_model(
        graph, functions=[] if subject.body is None else [subject.body],
        opset_imports=subject.model.opset_import, ir_version=subject.model.ir_version,
    )  # fmt: skip
    content: bytes = model.SerializeToString()
    return content


# ------------------------------------------------------------------------------------------------ inputs and truth


def drawn(subject: Subject, sizes: Mapping[str, int], dtype: str, case: Case) -> dict[str, Array]:
    """Inputs as in a trained model, as float32 that `dtype` holds.

    With long decay the state keeps a tenth or more of what went in over a thousand tokens.
    """
    rng = np.random.default_rng([case.seed, case.length, case.long_decay])
    values: dict[str, Array] = {}
    for spec in subject.operator.present(subject.has):
        value: Array = rng.standard_normal([sizes[letter] for letter in spec.dims])
        if spec.name == "A":
            value = -rng.uniform(0.01, 1, value.shape) if case.long_decay else -rng.uniform(1, 16, value.shape)
        elif spec.name in STEPS:  # before softplus: 0.001 to 0.1 after it, where new models begin, and about them
            usual = 10 ** rng.uniform(-3, -2.5 if case.long_decay else -1, value.shape[-1])
            value = np.log(np.expm1(usual)) + value / 2
        elif spec.name.endswith("bias") or spec.name == "weight":
            value = value / 2
        elif spec.name == "D":
            value = 1 + value / 2
        elif spec.name == "mask":
            value = value > 0
        values[spec.name] = value.astype(np.float32)
        if spec.activation:
            values[spec.name] = rounded(values[spec.name], dtype)
    return values


def rounded(x: Array, dtype: str) -> Array:
    """float32, to the nearest numbers that `dtype` holds."""
    if dtype != "bfloat16":
        kept: Array = x.astype(dtype).astype(np.float32)
        return kept
    bits = x.view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + (bits >> 16 & 1)  # ties to even
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def definition(operator: Operator, values: Mapping[str, Array], kind: type[np.floating[Any]]) -> Array:
    """What the operator is, all of it in numbers of that kind."""
    return convolution(values, kind) if operator is SHORT_CONV else recurrence(operator, values, kind)


def convolution(values: Mapping[str, Array], kind: type[np.floating[Any]]) -> Array:
    """silu(bias + sum over k of weight[:,k] x_{t-K+1+k})"""
    x, weight = values["x"].astype(kind), values["weight"].astype(kind)
    total = np.zeros_like(x) + values.get("bias", np.float32(0)).astype(kind)  # [B,L,D]
    for back in range(min(x.shape[1], weight.shape[1])):
        total[:, back:] += weight[:, -1 - back] * x[:, : x.shape[1] - back]
    return total / (1 + np.exp(-total))


def recurrence(operator: Operator, values: Mapping[str, Array], kind: type[np.floating[Any]]) -> Array:
    """A scan, one token after another.

    state = exp(step A) state + step x B;  y = (C state + D x) silu(z);  step = softplus(step + bias) mask
    """
    x, step, A, Bm, C = (values[spec.name].astype(kind) for spec in operator.required)
    D, z, bias, mask = (values[spec.name].astype(kind) if spec.name in values else None for spec in operator.optional)
    step = np.logaddexp(kind(0), step if bias is None else step + bias)
    if mask is not None:
        step = step * mask[:, :, None]
    # Both scans as one: channels [H,P] and decays [H,1,1]; Mamba-1 has P = 1 and a decay for each of N.
    ssd = operator is SSD_SCAN
    x, A = (x, A[:, None, None]) if ssd else (x[..., None], A[:, None, :])  # [B,L,H,P], [H,1,1|N]
    share = x.shape[2] // Bm.shape[2]  # heads of a group
    state = np.zeros((x.shape[0], *x.shape[2:], Bm.shape[3]), kind)  # [B,H,P,N]
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        b, c = (np.repeat(v[:, t], share, axis=1) for v in (Bm, C))  # [B,H,N]
        dt = step[:, t, :, None]  # [B,H,1]
        state *= np.exp(dt[..., None] * A)
        state += (dt * x[:, t])[..., None] * b[:, :, None]
        y[:, t] = np.einsum("bhpn,bhn->bhp", state, c)
    if D is not None:
        y += D[:, None] * x
    y = y if ssd else y[..., 0]
    return y if z is None else y * z / (1 + np.exp(-z))
