"""Level "operators": each scan of a bundle alone, at the bundle's widths, against its definition in float64.

The definition below goes token by token and shares no line with the forms it judges: the native library, and the
function body in the bundle's own graphs. Inputs are numbers that the deployed type holds, so the truth sees what the
backend sees; the floor is the definition in float32, its result rounded to the deployed type.

Letters as in `plugins/contract.py`: B batch, L length, D channels, H heads, P head width, N state, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from mdm.plugins.contract import DOMAIN, OPERATORS, SSD_SCAN, Operator
from mdm.plugins.errors import MdmError
from mdm.plugins.library import REGISTERED
from mdm.runtime.bundle import Bundle
from mdm.runtime.ort import OrtBackend, engine_errors, session_options
from mdm.tools.check.finding import Array, Finding, Verdict, difference
from mdm.tools.check.limits import Multiples

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto, NodeProto
    from onnxruntime import InferenceSession

LEVEL = "operators"
TYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # of activations, by precision
LIBRARY, BODY = "native library", "function body"
SHORT = (1, 37, 65)  # one token, an odd number, one past the edge of a chunk
LONG = (129, 1063)  # at least past two edges; at most, as far as WORK goes
WORK = 2e8  # tokens times values of state in all long cases: 3 ns each at large widths, 20 at small ones or Mamba-1


@dataclass(frozen=True)
class Scan:
    """A scan as the bundle's graphs have it."""

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


def check_operators(backend: OrtBackend, multiples: Multiples, seeds: Sequence[int]) -> Iterator[Finding]:
    if find_spec("onnx") is None:
        reason = "the Python module onnx is not installed, which a model of one operator is made with"
        yield Finding(LEVEL, "scans", "", "", Verdict.SKIPPED, reason)
        return
    try:
        scans = scans_of(backend.bundle)
    except (MdmError, ValueError) as error:  # a graph that was changed, or is none
        yield failed("scans", "", "", error)
        return
    cases = cases_of(backend.bundle.manifest["config"], seeds, len(scans))
    for scan in scans:
        yield from check_scan(backend, multiples, scan, cases)


def check_scan(backend: OrtBackend, multiples: Multiples, scan: Scan, cases: Sequence[Case]) -> Iterator[Finding]:
    manifest = backend.bundle.manifest
    dtype, sizes = TYPES[manifest["precision"]], sizes_of(manifest["config"])
    content = one_node(scan, dtype)
    forms = {}
    for place, part in enumerate(parts_of(backend, scan)):
        try:
            forms[part] = (
                without_library(backend, scan, content) if place else backend.session(content, scan.name, scan.used)
            )
        except MdmError as error:
            yield failed(scan.name, part, "", error)
    for case in cases:
        inputs = drawn(scan, {**sizes, "B": case.batch, "L": case.length}, dtype, case)
        truth = recurrence(scan.operator, inputs, np.float64)
        floor = difference(rounded(recurrence(scan.operator, inputs, np.float32), dtype), truth)
        limits = multiples.limits(floor, dtype)
        for part, session in forms.items():
            try:
                with engine_errors(scan.name):
                    found = session.run(None, inputs)[0]
                off = difference(found, truth)
            except (MdmError, ValueError) as error:  # it does not run, or comes out in another shape
                yield failed(scan.name, part, str(case), error)
                continue
            passed = limits.used(off) <= 1
            said = "" if passed else f"y{list(off.at)} is {off.found:.6g}, expected {off.truth:.6g}"
            verdict = Verdict.PASS if passed else Verdict.FAIL
            yield Finding(LEVEL, scan.name, part, str(case), verdict, said, truth.shape, off, floor, limits)


def failed(subject: str, part: str, case: str, error: Exception) -> Finding:
    return Finding(LEVEL, subject, part, case, Verdict.FAIL, " ".join(str(error).split()))


# --------------------------------------------------------------------------------------------------- what there is


def scans_of(bundle: Bundle) -> list[Scan]:
    """The different scans of all graphs: by attributes, and by the body in their file."""
    from onnx import load_model_from_string

    from mdm.plugins.functions import attributes_of, scan_nodes

    found: dict[Any, Scan] = {}
    for name in bundle.manifest["graphs"]:
        content = bundle.graph_bytes(name)
        try:
            model = load_model_from_string(content)
        except Exception as error:  # protobuf's own class
            raise ValueError(f"graph '{name}' is not an ONNX file: {error}") from error
        bodies = {function.name: function for function in model.functions if function.domain == DOMAIN}
        for node in scan_nodes(model):
            attributes, body = attributes_of(node), bodies.get(node.op_type)
            key = node.op_type, *attributes.values(), body and body.SerializeToString(deterministic=True)
            OPERATORS[node.op_type].present(attributes["has"])
            found.setdefault(key, Scan(OPERATORS[node.op_type], attributes["has"], node, body, model))
    return list(found.values())


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    inner = config["expand"] * config["width"]
    if config["mixer"] == "mamba1":
        return {"D": inner, "N": config["state"], "G": 1}
    return {"H": inner // config["head"], "P": config["head"], "N": config["state"], "G": config["groups"]}


def cases_of(config: Mapping[str, Any], seeds: Sequence[int], scans: int) -> list[Case]:
    state = config["expand"] * config["width"] * config["state"]
    least, most = LONG
    long = int(min(max(WORK / (2 * state * len(seeds) * scans), least), most)) | 1
    cases = []
    for seed in seeds:
        cases += [Case(length, 2, False, seed) for length in SHORT]
        cases += [Case(long, 1, long_decay, seed) for long_decay in (False, True)]
    return cases


def parts_of(backend: OrtBackend, scan: Scan) -> list[str]:
    """The forms to judge: first what the backend takes, then, where that is the library, the body behind it."""
    try:
        backend.options(scan.used).get_session_config_entry(REGISTERED)
    except RuntimeError:  # no such entry: the library was not built, or is not for this backend
        return [BODY]
    return [LIBRARY] if scan.body is None else [LIBRARY, BODY]


def without_library(backend: OrtBackend, scan: Scan, content: bytes) -> InferenceSession:
    from onnxruntime import InferenceSession

    options = session_options(backend.bundle.path, backend.threads, native=False)
    with engine_errors(f"the function body of {scan.name}"):
        return InferenceSession(content, options, providers=[backend.provider_options()])


def one_node(scan: Scan, dtype: str) -> bytes:
    """A model of the scan alone. It takes and gives float32, whatever the scan does: numpy has no bfloat16."""
    from onnx import NodeProto, TensorProto, helper

    from mdm.plugins.functions import TYPES as NUMBERS

    present = scan.operator.present(scan.has)
    infos = [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, list(spec.dims)) for spec in present]
    casts = [
        helper.make_node("Cast", [spec.name], [f"{spec.name}_"], to=NUMBERS[dtype])
        for spec in present
        if spec.activation
    ]
    node = NodeProto()
    node.CopyFrom(scan.node)
    node.ClearField("input")
    node.ClearField("output")
    node.input.extend(f"{spec.name}_" if spec.activation else spec.name for spec in present)
    node.output.append("y_")
    back = helper.make_node("Cast", ["y_"], ["y"], to=TensorProto.FLOAT)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(present[0].dims))
    graph = helper.make_graph([*casts, node, back], "scan", infos, [y])
    model = helper.make_model(
        graph, functions=[] if scan.body is None else [scan.body],
        opset_imports=scan.model.opset_import, ir_version=scan.model.ir_version,
    )  # fmt: skip
    content: bytes = model.SerializeToString()
    return content


# ------------------------------------------------------------------------------------------------ inputs and truth


def drawn(scan: Scan, sizes: Mapping[str, int], dtype: str, case: Case) -> dict[str, Array]:
    """Inputs as in a trained model, as float32 that `dtype` holds.

    With long decay the state keeps a tenth or more of what went in over a thousand tokens.
    """
    rng = np.random.default_rng([case.seed, case.length, case.long_decay])
    step, bias = scan.operator.inputs[1].name, scan.operator.optional[2].name
    values: dict[str, Array] = {}
    for spec in scan.operator.present(scan.has):
        value: Array = rng.standard_normal([sizes[letter] for letter in spec.dims])
        if spec.name == "A":
            value = -rng.uniform(0.01, 1, value.shape) if case.long_decay else -rng.uniform(1, 16, value.shape)
        elif spec.name == step:  # before softplus: steps of 0.001 to 0.1 where new models begin, and about them
            usual = 10 ** rng.uniform(-3, -2.5 if case.long_decay else -1, value.shape[-1])
            value = np.log(np.expm1(usual)) + value / 2
        elif spec.name == bias:
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


def recurrence(operator: Operator, values: Mapping[str, Array], kind: type[np.floating[Any]]) -> Array:
    """The definition, one token after another, all of it in numbers of that kind.

    state = exp(step A) state + step x B;  y = (C state + D x) silu(z);  step = softplus(step + bias) mask
    """
    x, step, A, Bm, C = (values[spec.name].astype(kind) for spec in operator.required)
    D, z, bias, mask = (values[spec.name].astype(kind) if spec.name in values else None for spec in operator.optional)
    step = np.logaddexp(kind(0), step if bias is None else step + bias)
    if mask is not None:
        step = step * mask[:, :, None]
    # Both operators as one: channels [H,P] and decays [H,1,1]; Mamba-1 has P = 1 and a decay for each of N.
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
