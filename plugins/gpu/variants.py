"""Which kernels there are, and which of them serve which sizes. Pure data and arithmetic: nothing here needs Triton.

    plan = choose(SSD_SCAN, "bfloat16", sizes, has=7, multiprocessors=132, capability=(9, 0))
    for launch in plan.launches: ...     # each with its variant, grid, and the value of every integer argument

A pointer argument is called like the operator's input, `y`, or one of the plan's scratch buffers; the plan names those
that must be given. The pointer of an absent input or buffer may be any aligned one.

How a scan is laid over a GPU:
* One launch (`*_scan`) with a program for each sample, head and block of W of its width (Mamba-1: W channels). Narrow
  blocks are twice as many, and each repeats the products of B and C: for N = 128, P = 64, 29% more operations. The wide
  ones are taken where there are two of them for each multiprocessor.
* Where that would leave half of the multiprocessors idle and the sequence is long, it is cut into segments, in three
  launches (see common.py). They read x, B and the steps twice, and take a quarter more operations for Mamba-2 and 70%
  more for Mamba-1: worth it from twice the programs on.

The short convolution is one launch, with a program for T tokens of W channels. What else could be joined to a scan is
left apart, since counting says that it does not pay (see BENCHMARKS.md).

Letters as in the contract; W width of a block, Q tokens of a chunk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Any

from mdm.plugins.contract import ACTIVATIONS, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, Operator
from mdm.plugins.errors import InputError

# name, type, divisor (of a pointer in bytes). T is the type of the activations.
Argument = tuple[str, str, int]


@dataclass(frozen=True)
class Variant:
    """One kernel to compile."""

    kernel: str
    dtype: str  # of the activations
    constants: Mapping[str, int]
    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    variant: Variant
    numbers: Mapping[str, int]  # the integer arguments, and what else the grid counts

    @property
    def grid(self) -> tuple[int, ...]:
        known = {**self.variant.constants, **self.numbers}
        return tuple(size_of(rule, known) for rule in KERNELS[self.variant.kernel].grid)


@dataclass(frozen=True)
class Plan:
    """Launches in order, none where y has no elements."""

    launches: tuple[Launch, ...]
    pointers: tuple[str, ...]  # what must be given: the inputs that are there, y, and the scratch buffers
    scratch: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of float32 buffers for the launches

    @property
    def places(self) -> dict[str, int]:
        """Where each scratch buffer lies in one workspace, in bytes; under "" the workspace's size."""
        return dict(zip([*self.scratch, ""], accumulate(map(_room, self.scratch.values()), initial=0), strict=True))


def _room(shape: tuple[int, ...]) -> int:
    """Bytes of a scratch buffer, so that the next one is aligned too."""
    return -(-4 * prod(shape) // ALIGN) * ALIGN


def size_of(rule: str, known: Mapping[str, int]) -> int:
    """One size of a grid. "R/W*G" is read from left to right, and a quotient is rounded up."""
    size = 1
    for sign, name in re.findall(r"([*/]?)(\w+)", rule):
        number = int(name) if name.isdigit() else known[name]
        size = -(-size // number) if sign == "/" else size * number
    return size


def _arguments(activations: str, floats: str, integers: Mapping[str, int]) -> dict[str, Argument]:
    pointers = {name: (name, f"*{type_}", 16) for type_, names in (("T", activations), ("fp32", floats))
                for name in names.split()}  # fmt: skip
    return pointers | {name: (name, "i32", divisor) for name, divisor in integers.items()}


_FLOATS = "A D dt_bias delta_bias mask states step_sums weight bias"
_SSD = _arguments("x dt Bm C z y", _FLOATS, {"L": 1, "H": 1, "P": 16, "G": 1, "segment": 16, "has": 1})
_SELECTIVE = _arguments("u delta Bm C z y", _FLOATS, {"L": 1, "R": 16, "G": 1, "segment": 16, "has": 1})
_CONV = _arguments("x y", _FLOATS, {"L": 1, "D": 16, "has": 1})
_CARRY = _arguments("", _FLOATS, {"segments": 1, "size": 16, "per_step": 1, "per_A": 1})


@dataclass(frozen=True)
class Kernel:
    """Where a kernel is, its arguments in order, and the rules of its grid's three sizes (see `size_of`)."""

    module: str
    arguments: tuple[Argument, ...]
    grid: tuple[str, str, str]


def _kernel(module: str, arguments: dict[str, Argument], names: str, *grid: str) -> Kernel:
    x, y, z = grid
    return Kernel(f"mdm.plugins.gpu.{module}", tuple(arguments[name] for name in names.split()), (x, y, z))


KERNELS = {
    "ssd_scan": _kernel(
        "ssd", _SSD, "x dt A Bm C D z dt_bias mask states y L H P G segment has", "H*P/W", "segments", "B"
    ),
    "ssd_segment_states": _kernel(
        "ssd", _SSD, "x dt A Bm dt_bias mask states step_sums L H P G segment has", "H*P/W*N/K", "segments", "B"
    ),
    "selective_scan": _kernel(
        "selective", _SELECTIVE, "u delta A Bm C D z delta_bias mask states y L R G segment has",
        "R/W*G", "segments", "B",
    ),
    "selective_segment_states": _kernel(
        "selective", _SELECTIVE, "u delta A Bm delta_bias mask states step_sums L R G segment has",
        "R/W*G", "segments", "B",
    ),
    "short_conv": _kernel("conv", _CONV, "x weight bias y L D has", "D/W", "L/T", "B"),
    "carry_states": _kernel(
        "common", _CARRY, "states step_sums A segments size per_step per_A", "size/BLOCK", "B", "1"
    ),
}  # fmt: skip

ALIGN = 256  # bytes: what TensorRT and CUDA give, and more than a kernel asks for
HAS_START = 16  # in `has`, behind the contract's bits
SSD_STATES = (16, 32, 64, 128)
SELECTIVE_STATES = (16,)
CONV_TAPS = (2, 3, 4)
UNIT = 64  # tokens: segments are whole numbers of them
# Segments shorter than this cost more in launches and start states than they gain.
SHORTEST = 4 * UNIT
CARRY_BLOCK = 256
# More than any GPU has. What a workspace may take is known from it before the GPU and the sizes are.
MOST_MULTIPROCESSORS = 192


def ssd_variant(dtype: str, N: int, W: int, Q: int) -> Variant:
    """Float32 has no matrix instructions: its products want all their operands in registers, so tiles are small."""
    if dtype == "float32":
        return Variant("ssd_scan", dtype, {"N": N, "K": min(N, 64), "W": W, "Q": Q}, 8 if N >= 64 else 4, 2)
    return Variant("ssd_scan", dtype, {"N": N, "K": N, "W": W, "Q": Q}, 8 if N * W > 4096 else 4, 2)


def ssd_states_variant(dtype: str, N: int) -> Variant:
    K, Q = (min(N, 64), 32) if dtype == "float32" else (N, 64)
    return Variant("ssd_segment_states", dtype, {"N": N, "K": K, "W": 32, "Q": Q}, 4, 2)


def selective_variant(kernel: str, dtype: str, N: int) -> Variant:
    return Variant(kernel, dtype, {"N": N, "S": 4, "W": 32, "Q": 16}, 4, 2)


def conv_variant(dtype: str, K: int) -> Variant:
    return Variant("short_conv", dtype, {"K": K, "W": 128, "T": 16}, 4, 1)


def ssd_widths(dtype: str, N: int) -> tuple[int, ...]:
    """Narrow and wide."""
    if dtype == "float32":
        return (16,) if N == 128 else (32,)
    return (32, 64)


def ssd_chunk(dtype: str, capability: tuple[int, int]) -> int:
    """64 rows are what the matrix instructions of 9.0 to 11.0 take at once. The others hold operands in registers, and
    so does the PTX for 8.0 that serves what we have no cubin for (10.3)."""
    if dtype == "float32":
        return 16
    return 64 if capability in ((9, 0), (10, 0), (11, 0)) else 32


def serves(variant: Variant, capability: tuple[int, int]) -> bool:
    """Whether `choose` may choose this variant there."""
    is_scan = variant.kernel == "ssd_scan"
    return not is_scan or variant.constants["Q"] == ssd_chunk(variant.dtype, capability)


def variants() -> Iterator[Variant]:
    """Everything `choose` may choose."""
    for dtype in ACTIVATIONS:
        chunks = {ssd_chunk(dtype, (major, 0)) for major in (8, 9)}
        for N in SSD_STATES:
            for W in ssd_widths(dtype, N):
                yield from (ssd_variant(dtype, N, W, Q) for Q in sorted(chunks))
            yield ssd_states_variant(dtype, N)
        yield from (conv_variant(dtype, K) for K in CONV_TAPS)
        for N in SELECTIVE_STATES:
            yield from (selective_variant(f"selective_{part}", dtype, N) for part in ("scan", "segment_states"))
    yield CARRY


CARRY = Variant("carry_states", "float32", {"BLOCK": CARRY_BLOCK}, 4, 1)


def choose(
    operator: Operator,
    dtype: str,
    sizes: Mapping[str, int],
    has: int,
    multiprocessors: int,
    capability: tuple[int, int],
) -> Plan:
    """How a scan of these sizes (the contract's letters) is launched."""
    operator.present(has)
    if dtype not in ACTIVATIONS:
        raise InputError(
            f"{operator.name}: no GPU kernel for activations of type {dtype!r}\n"
            f"expected one of: {', '.join(ACTIVATIONS)}"
        )
    multiprocessors = min(multiprocessors, MOST_MULTIPROCESSORS)
    if operator is SHORT_CONV:
        return _choose_conv(dtype, sizes, has)
    return (_choose_ssd if operator is SSD_SCAN else _choose_selective)(dtype, sizes, has, multiprocessors, capability)


def check_model(config: Mapping[str, Any]) -> None:
    """An error where a model, by its config, has an operator that no kernel serves: types are all alike in this."""
    for operator, sizes in operators_of(config):
        choose(operator, "float32", {"B": 1, "L": 1, **sizes}, 0, 1, (9, 0))


def operators_of(config: Mapping[str, Any]) -> Iterator[tuple[Operator, dict[str, int]]]:
    """A model's operators, and their sizes besides B and L."""
    inner = whole_number(config, "expand") * whole_number(config, "width")
    N, G = whole_number(config, "state"), whole_number(config, "groups")
    if config.get("mixer") == "mamba1":
        mixed = inner
        yield SELECTIVE_SCAN, {"D": inner, "G": G, "N": N}
    else:
        mixed, P = inner + 2 * G * N, whole_number(config, "head")
        yield SSD_SCAN, {"H": inner // P, "P": P, "G": G, "N": N}
    yield SHORT_CONV, {"D": mixed, "K": whole_number(config, "conv")}


def whole_number(config: Mapping[str, Any], name: str, least: int = 1) -> int:
    value = config.get(name)
    if type(value) is not int or value < least:
        raise InputError(f"the model's config says {name} = {value!r:.40}, expected a whole number of {least} or more")
    return value


def workspace_limit(operator: Operator, dtype: str, most: Mapping[str, int]) -> int:
    """Bytes that no plan for sizes up to these exceeds, on any GPU: 0 where none of them is cut.

    What is cut fills half of the multiprocessors or fewer, and then becomes two programs for each of them or fewer. The
    rest is by channels, since other blocks and heads may share them out otherwise."""
    segments = most["L"] // SHORTEST
    if operator is SHORT_CONV or segments < 2:
        return 0
    channels = prod(most[letter] for letter in ("BHP" if operator is SSD_SCAN else "BD"))

    def in_segments(W: int) -> int:
        """Channels of all samples and segments, in programs for W."""
        return min(2 * MOST_MULTIPROCESSORS * W, min(MOST_MULTIPROCESSORS // 2 * W, channels) * segments)

    if operator is SSD_SCAN:
        heads = in_segments(32) // 32  # the narrowest there are
        return _room((in_segments(ssd_widths(dtype, most["N"])[0]), most["N"])) + _room((heads,))
    wide = in_segments(selective_variant("selective_scan", dtype, most["N"]).constants["W"])
    return _room((wide, most["N"])) + _room((wide,))


def _choose_ssd(
    dtype: str, sizes: Mapping[str, int], has: int, multiprocessors: int, capability: tuple[int, int]
) -> Plan:
    B, L, H, P, G, N = (sizes[letter] for letter in "BLHPGN")
    _require(SSD_SCAN, "N", N, N in SSD_STATES, f"one of {', '.join(map(str, SSD_STATES))}")
    _require(SSD_SCAN, "P", P, P % 32 == 0, "a multiple of 32")
    if not B * L * H * P:
        return Plan((), ())
    _require_room(SSD_SCAN, B, L, H * P, G * N)
    narrow, wide = (ws := [W for W in ssd_widths(dtype, N) if P % W == 0])[0], ws[-1]
    segments, segment = _segments(B * H * P // narrow, L, multiprocessors)
    W = wide if segments * B * H * P // wide >= 2 * multiprocessors else narrow
    scan = ssd_variant(dtype, N, W, ssd_chunk(dtype, capability))
    numbers = {"B": B, "L": L, "H": H, "P": P, "G": G, "segments": segments, "segment": segment, "has": has}
    if segments == 1:
        return Plan((Launch(scan, numbers),), _pointers(SSD_SCAN, has))
    scratch = {"states": (B, segments, H, N, P), "step_sums": (B, segments, H)}
    return Plan(
        (
            Launch(ssd_states_variant(dtype, N), numbers),
            _carry(B, segments, H * N * P, N * P, N * P),
            Launch(scan, numbers | {"has": has | HAS_START}),
        ),
        _pointers(SSD_SCAN, has, *scratch),
        scratch,
    )


def _choose_selective(
    dtype: str, sizes: Mapping[str, int], has: int, multiprocessors: int, capability: tuple[int, int]
) -> Plan:
    B, L, D, G, N = (sizes[letter] for letter in "BLDGN")
    R = D // G
    _require(SELECTIVE_SCAN, "N", N, N in SELECTIVE_STATES, f"one of {', '.join(map(str, SELECTIVE_STATES))}")
    _require(SELECTIVE_SCAN, "D / G", R, R % 16 == 0, "a multiple of 16")
    if not B * L * D:
        return Plan((), ())
    _require_room(SELECTIVE_SCAN, B, L, D, G * N)
    scan = selective_variant("selective_scan", dtype, N)
    segments, segment = _segments(B * G * -(-R // scan.constants["W"]), L, multiprocessors)
    numbers = {"B": B, "L": L, "R": R, "G": G, "segments": segments, "segment": segment, "has": has}
    if segments == 1:
        return Plan((Launch(scan, numbers),), _pointers(SELECTIVE_SCAN, has))
    scratch = {"states": (B, segments, D, N), "step_sums": (B, segments, D)}
    return Plan(
        (
            Launch(selective_variant("selective_segment_states", dtype, N), numbers),
            _carry(B, segments, D * N, N, 1),
            Launch(scan, numbers | {"has": has | HAS_START}),
        ),
        _pointers(SELECTIVE_SCAN, has, *scratch),
        scratch,
    )


def _choose_conv(dtype: str, sizes: Mapping[str, int], has: int) -> Plan:
    B, L, D, K = (sizes[letter] for letter in "BLDK")
    _require(SHORT_CONV, "K", K, K in CONV_TAPS, f"one of {', '.join(map(str, CONV_TAPS))}")
    _require(SHORT_CONV, "D", D, D % 16 == 0, "a multiple of 16")
    T = conv_variant(dtype, K).constants["T"]
    _require(SHORT_CONV, "L", L, L <= 65535 * T, f"at most {65535 * T}")  # a grid's second size is 65535 at most
    if not B * L * D:
        return Plan((), ())
    _require_room(SHORT_CONV, B, L, D)
    numbers = {"B": B, "L": L, "D": D, "has": has}
    return Plan((Launch(conv_variant(dtype, K), numbers),), _pointers(SHORT_CONV, has))


def _pointers(operator: Operator, has: int, *scratch: str) -> tuple[str, ...]:
    return (*(spec.name for spec in operator.present(has)), "y", *scratch)


def _segments(programs: int, L: int, multiprocessors: int) -> tuple[int, int]:
    """How many segments, and their tokens: for two programs a multiprocessor, and no last one that waits for them."""
    segments = min(2 * multiprocessors // programs, L // SHORTEST)
    if 2 * programs > multiprocessors or segments < 2:
        return 1, -(-L // UNIT) * UNIT
    segment = -(-L // (segments * UNIT)) * UNIT
    return -(-L // segment), segment


def _carry(B: int, segments: int, size: int, per_step: int, per_A: int) -> Launch:
    numbers = {"B": B, "segments": segments, "size": size, "per_step": per_step, "per_A": per_A}
    return Launch(CARRY, numbers)


def _require(operator: Operator, letter: str, size: int, fits: bool, expected: str) -> None:
    if not fits:
        raise InputError(
            f"{operator.name}: no GPU kernel for {letter} = {size}\nexpected {expected}\n"
            "use the operator's ONNX function instead"
        )


def _require_room(operator: Operator, B: int, L: int, *rows: int) -> None:
    """Within a sample the kernels count elements in 32 bits; a grid has at most 65535 samples."""
    elements = prod((L + UNIT, max(rows)))
    if elements >= 2**31 or B > 65535:
        raise InputError(
            f"{operator.name}: a batch of {B} samples with {elements} elements is too large for a launch\n"
            "expected at most 65535 samples, each of fewer than 2^31 elements"
        )
