"""Which versions of TensorRT and ONNX Runtime take a graph: what their makers write of them, and nothing guessed.

Sources, named at each fact: "operators.md" of ONNX-TensorRT (of releases 10.0, 10.1 and 10.15: the opsets, operators
and types that its parser takes), its Changelog.md, the release notes of TensorRT, and its support matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from mdm.runtime.tensorrt.versions import PLUGINS_FIRST, version_of

FLOATS = {"float32", "float16", "bfloat16"}
NUMBERS = FLOATS | {"int32", "int64"}
ANY = NUMBERS | {"bool"}

# operators.md of 10.15: what the data of an operator may be. Names that 10.1's lacks are in SINCE. What neither list
# has as supported the parser imports by a function or a plugin, or refuses. int64 came with 9.0 (Changelog.md), with
# bindings that are int64 too.
OPERATORS_BY_TYPES: tuple[tuple[str, set[str]], ...] = (
    (
        "Acos Acosh Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose "
        "Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool "
        "GroupNormalization HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM "
        "LayerNormalization LeakyRelu Log LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization "
        "PRelu ParametricSoftplus QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform "
        "RandomUniformLike Reciprocal Resize RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax "
        "Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
        FLOATS,
    ),
    ("BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign STFT",
     FLOATS - {"bfloat16"}),
    (
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min "
        "Mod Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
        "ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum "
        "TensorScatter TopK",
        NUMBERS,
    ),
    ("Cast CastLike", ANY | {"uint8"}),
    (
        "Concat Constant ConstantOfShape Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot "
        "Reshape ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
        ANY,
    ),
    ("And Not Or Xor", {"bool"}),
    ("DequantizeLinear", {"int8"}),
)  # fmt: skip
TAKES: Mapping[str, set[str]] = {name: types for names, types in OPERATORS_BY_TYPES for name in names.split()}
DATA = {"Where": 1}  # which input holds the data, where it is not the first
Version = tuple[int, int]
SINCE: Mapping[str, Version] = {
    "BlackmanWindow": (10, 4), "HammingWindow": (10, 4), "HannWindow": (10, 4), "STFT": (10, 5),  # Changelog.md
    "Attention": (10, 14),  # TensorRT's release notes, as the next
    "RMSNormalization": (10, 15), "RotaryEmbedding": (10, 15), "TensorScatter": (10, 15),
}  # fmt: skip

LEAST_OPSET = 9  # operators.md of 10.0 and of 10.15


@dataclass(frozen=True)
class Release:
    """Releases alike in what matters here: the first of them, and the last opset that they are known to take."""

    first: Version
    name: str
    opset: int
    note: str = ""


RELEASES = (
    # 10.3 is the first whose plugin interface ours is compiled for and tested with. operators.md: opset 9 to 20.
    # JetPack's release notes: JetPack 6.1 and 6.2 have TensorRT 10.3.
    Release((10, 3), "TensorRT 10.3 to 10.6", 20, "JetPack 6.1 and 6.2 have 10.3"),
    # No operators.md of these was at hand: 10.1's holds on.
    Release((10, 7), "TensorRT 10.7 to 10.14", 20),
    Release((10, 15), "TensorRT 10.15 and 10.16", 24),  # operators.md of 10.15: opset 9 to 24
    # Release notes of 11.4.1: JetPack 7.2.2 on AGX Orin and Thor; 11.0 to 11.4.0 support no JetPack.
    Release((11, 0), "TensorRT 11.0 to 11.4", 24, "from 11.4.1 on JetPack 7.2.2"),
    Release((11, 5), "TensorRT 11.5", 25),  # release notes of 11.5: opset 25
)
# Release notes of ONNX Runtime: 1.24.1 has ONNX 1.20.1, 1.25.0 has ONNX 1.21.0; 1.22 is the oldest this project takes,
# and has ONNX 1.17. By ONNX's own table of versions that is IR 10 and opset 22, IR 13 and 25, IR 13 and 26.
RUNTIMES = (("1.22", 10, 22), ("1.24.1", 13, 25), ("1.25", 13, 26))


@dataclass
class Asked:
    """What graphs ask of whoever runs them."""

    opset: int = 0
    ir: int = 0
    plugins: bool = False
    operators: set[str] = field(default_factory=set)  # TensorRT's own
    types: set[str] = field(default_factory=set)  # of any tensor


@dataclass(frozen=True)
class Verdict:
    target: str
    takes: str  # "yes", "no", "by bodies" or "not known"
    why: str = ""


def verdicts(asked: Asked) -> list[Verdict]:
    before = Verdict("TensorRT before 10.3", "no", "mdm-deploy needs the plugin interface of 10.3")
    return [before, *(_release(release, asked) for release in RELEASES), _runtime(asked), _gpu(asked)]


def refused_types(operators: Mapping[str, Collection[str]]) -> list[str]:
    """Operators that TensorRT has, on data that it does not take there. float64 it makes float32 where it can
    (operators.md), and what has no known type is not judged."""
    return [
        f"{name} of {', '.join(sorted(wrong))}"
        for name, types in sorted(operators.items())
        if (wrong := {*types} - TAKES[name] - {"", "float64"})
    ]


def _release(release: Release, asked: Asked) -> Verdict:
    late = sorted(name for name in asked.operators if SINCE.get(name, (0, 0)) > release.first)
    note = release.note
    if late:
        said = ", ".join(f"{name} came with {'.'.join(map(str, SINCE[name]))}" for name in late)
        return Verdict(release.name, "no", said)
    if asked.opset < LEAST_OPSET:
        return Verdict(release.name, "no", f"opset {asked.opset}, where {LEAST_OPSET} is the least")
    if asked.opset > release.opset:
        said = f"the file's opset is {asked.opset}, its notes name those to {release.opset}"
        return Verdict(release.name, "not known", "; ".join(filter(None, (said, note))))
    if asked.plugins and release.first < version_of(PLUGINS_FIRST):
        note = "; ".join(filter(None, ("by mdm build: trtexec takes the bodies there", note)))
    return Verdict(release.name, "yes", note)


def _runtime(asked: Asked) -> Verdict:
    least = next((name for name, ir, opset in RUNTIMES if asked.ir <= ir and asked.opset <= opset), None)
    if least is None:
        return Verdict("ONNX Runtime", "not known", f"opset {asked.opset} and IR {asked.ir} are newer than is known of")
    why = "its CPU has no bfloat16" if "bfloat16" in asked.types else ""
    return Verdict(f"ONNX Runtime {least} and later", "yes", why)


def _gpu(asked: Asked) -> Verdict:
    """Support matrix: bfloat16 needs compute capability 8.0. Our kernels are compiled for 8.0 and later."""
    needs = [name for name, there in (("plugins", asked.plugins), ("bfloat16", "bfloat16" in asked.types)) if there]
    if needs:
        return Verdict("GPU of 8.0 and later", "yes", f"{' and '.join(needs)}: none before")
    return Verdict("GPU", "yes", "any that the TensorRT release supports")
