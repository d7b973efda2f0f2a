"""The contract of our operators, in one place: names, inputs, attributes, types, shapes, version.

The selective scan (Mamba-1), the SSD scan (Mamba-2), and the short convolution in front of either.

Every form of an operator reads this file: the torch custom ops, the ONNX function bodies, the TensorRT plugins, and the
native library, for which the build prints it as a C++ header (`python contract.py`). Only the standard library is used.

    a scan:           u or x, the step, A, Bm, C, then the optional inputs that are there, in the order D, z, bias, mask
    the convolution:  x, weight, then the bias if it is there

The int attribute `has` says which optional inputs are there, a bit for each. No node carries an empty-string input:
TensorRT's parser rejects it, and ONNX Runtime rejects a function body that mentions an absent input.

Letters: B batch, L length, D channels, H heads, P head width, N state, G groups of Bm and C (G divides D or H), K taps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

DOMAIN = "mdm"
# Of the domain's operator set. ONNX Runtime does not compare it for custom operators, so a change of meaning needs a
# new operator name, not only a new version.
VERSION = 1
ACTIVATIONS = ("float32", "float16", "bfloat16")  # what T may be; ONNX Runtime's CPU has no bfloat16


@dataclass(frozen=True)
class Input:
    """One input. Activations (T) all have one type; parameters and the mask are float32 whatever T is."""

    name: str
    dims: str  # a letter a dimension
    activation: bool = False
    bit: int = 0  # in `has`; 0: always there


@dataclass(frozen=True)
class Operator:
    """An operator. Its output `y` has the type and shape of its first input."""

    name: str
    inputs: tuple[Input, ...]
    attributes: Mapping[str, int]  # integers with their defaults; the plugin's name and version are strings beside them
    torch_name: str  # of the torch custom op, and of the reference function
    grouped: str = ""  # the letter whose size G divides, of an operator that has G

    @property
    def required(self) -> tuple[Input, ...]:
        return tuple(i for i in self.inputs if not i.bit)

    @property
    def optional(self) -> tuple[Input, ...]:
        return tuple(i for i in self.inputs if i.bit)

    @property
    def has_all(self) -> int:
        """`has` of a node with every input."""
        return sum(i.bit for i in self.inputs)

    def present(self, has: int) -> tuple[Input, ...]:
        """The inputs of a node with this `has`, in order."""
        if not 0 <= has <= self.has_all:
            bits = ", ".join(f"{i.bit} ({i.name})" for i in self.optional)
            raise ValueError(f"{self.name}: attribute 'has' is {has}, expected a sum of {bits}")
        return tuple(i for i in self.inputs if not i.bit or has & i.bit)

    def has_of(self, names: Iterable[str]) -> int:
        """The bit mask of the optional inputs named."""
        bits = {i.name: i.bit for i in self.optional}
        return sum(bits[name] for name in set(names))

    def check(self, shapes: Mapping[str, Sequence[int | None]]) -> None:
        """Raise for shapes that do not fit together; None is a size that is not known yet."""
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self.inputs:
            if spec.name not in shapes:
                continue
            shape = shapes[spec.name]
            if len(shape) != len(spec.dims):
                raise ValueError(
                    f"{self.name}: input '{spec.name}' has {len(shape)} dimensions, "
                    f"expected {len(spec.dims)} [{','.join(spec.dims)}]"
                )
            for letter, size in zip(spec.dims, shape, strict=True):
                if size is None:
                    continue
                known, first = sizes.setdefault(letter, (size, spec.name))
                if known != size:
                    raise ValueError(f"{self.name}: input '{spec.name}' has {letter} = {size}, '{first}' has {known}")
        if sizes.get("K", (1, ""))[0] < 1:
            raise ValueError(f"{self.name}: input '{sizes['K'][1]}' has K = 0, expected at least one tap")
        whole, groups = sizes.get(self.grouped), sizes.get("G")
        if whole and groups and (groups[0] == 0 or whole[0] % groups[0]):
            raise ValueError(
                f"{self.name}: input '{groups[1]}' has G = {groups[0]}, which does not divide "
                f"{self.grouped} = {whole[0]} of '{whole[1]}'"
            )


def _optional(channels: str, per_token: str, bias: str) -> tuple[Input, ...]:
    return (
        Input("D", channels, bit=1),
        Input("z", per_token, activation=True, bit=2),
        Input(bias, channels, bit=4),
        Input("mask", "BL", bit=8),
    )


SELECTIVE_SCAN = Operator(
    "MambaSelectiveScan",
    (
        Input("u", "BLD", activation=True),
        Input("delta", "BLD", activation=True),
        Input("A", "DN"),
        Input("Bm", "BLGN", activation=True),
        Input("C", "BLGN", activation=True),
        *_optional("D", "BLD", "delta_bias"),
    ),
    attributes={"has": 0},
    torch_name="selective_scan",
    grouped="D",
)

SSD_SCAN = Operator(
    "MambaSsdScan",
    (
        Input("x", "BLHP", activation=True),
        Input("dt", "BLH", activation=True),
        Input("A", "H"),
        Input("Bm", "BLGN", activation=True),
        Input("C", "BLGN", activation=True),
        *_optional("H", "BLHP", "dt_bias"),
    ),
    # chunk_size: tokens in a chunk, in the forms that let one choose; it changes rounding and speed, not the meaning.
    attributes={"has": 0, "chunk_size": 64},
    torch_name="ssd_scan",
    grouped="H",
)

# Depthwise, causal, with silu: y_t = silu(bias + sum over k of weight[:,k] x_{t-K+1+k}), 0 before the first token.
SHORT_CONV = Operator(
    "MambaShortConv",
    (Input("x", "BLD", activation=True), Input("weight", "DK"), Input("bias", "D", bit=1)),
    attributes={"has": 0},
    torch_name="short_conv",
)

SCANS = (SELECTIVE_SCAN, SSD_SCAN)
OPERATORS = {operator.name: operator for operator in (*SCANS, SHORT_CONV)}


def cpp_header() -> str:
    """The contract as constants for the native code."""

    def text(value: object) -> str:
        return f'"{value}"' if isinstance(value, str) else str(value).lower()

    lines = [
        "// Printed by contract.py. Do not edit.",
        "#pragma once",
        "namespace mdm {",
        "struct InputSpec { const char* name; const char* dims; bool activation; int bit; };",
        f'constexpr const char* kDomain = "{DOMAIN}";',
        f"constexpr int kVersion = {VERSION};",
    ]
    for operator in OPERATORS.values():
        rows = ["{" + ", ".join(map(text, dataclasses.astuple(i))) + "}" for i in operator.inputs]
        lines += [
            f"struct {operator.name} {{",
            f'  static constexpr const char* kName = "{operator.name}";',
            f"  static constexpr char kGrouped = {repr(operator.grouped) if operator.grouped else 0};",
            f"  static constexpr int kRequired = {len(operator.required)};",
            f"  static constexpr InputSpec kInputs[] = {{{', '.join(rows)}}};",
            "};",
        ]
    return "\n".join([*lines, "}  // namespace mdm", ""])


if __name__ == "__main__":
    print(cpp_header(), end="")
