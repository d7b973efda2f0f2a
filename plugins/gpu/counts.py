"""What an operator must take of a GPU, what a plan takes of it, and how long a chip needs for that at least.

    seconds, binding = least_time(floor(SSD_SCAN, "bfloat16", sizes, has), CHIPS["H200"])
    work = done(choose(SSD_SCAN, "bfloat16", sizes, has, 132, (9, 0)))

The floor is any program's: each present input is read once and y written once; Mamba-2 multiplies into and out of each
state, 2 N P a token and head; Mamba-1 takes, for each token, channel and state, one exponential and four operations
(scale the rate, let in, decay and add, read out); the convolution takes an operation for each tap; softplus and silu
take one special result each.

What a plan does is counted from the kernels' sources, launch by launch: whole tiles, also where a sequence or a group
ends within one. An operation is a multiplication with the addition behind it, or either alone. Not counted: float64
(a sum of a few numbers a token and program), conversions, comparisons, addresses, sums over threads.

Letters as in the contract; Q tokens of a chunk, W width of a block, K states of a block, R channels of a group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from mdm.plugins.contract import SELECTIVE_SCAN, SHORT_CONV, Operator
from mdm.plugins.gpu.variants import HAS_START, Launch, Plan

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
PER_STATE = 4  # operations of Mamba-1 for each token, channel and state
INFLOW = 3  # of these, all but the read-out
STEP = 11  # operations of a step: bias, softplus and its series, mask
STEP_SPECIALS = 2  # of a step: an exponential and a division
GATE = 4  # operations of an element's gate
GATE_SPECIALS = 2
SILU = 3  # operations of silu alone; as many specials as a gate
PER_PAIR = 6  # operations of Mamba-2 for each pair of a chunk's tokens: the decay between them, and their weight


@dataclass(frozen=True)
class Work:
    """Counts. Bytes of device memory count once a launch, however many programs load them: caches serve the rest."""

    read: int = 0  # bytes of device memory
    written: int = 0  # bytes of device memory
    loaded: int = 0  # bytes that programs ask for, B and C again for each head and block
    products: int = 0  # multiply-adds of matrices of half types, on the matrix units
    operations: int = 0  # on the float32 units, matrix products of float32 among them
    specials: int = 0  # results of the special-function units: an exponential, or a division's reciprocal
    launches: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def moved(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Chip:
    """What a GPU can do at most, a second."""

    name: str
    source: str
    multiprocessors: int
    capability: tuple[int, int]
    bandwidth: float  # bytes
    products: float  # multiply-adds of half types, dense, added up in float32
    operations: float
    specials: float


def _chip(
    name: str, source: str, multiprocessors: int, capability: tuple[int, int], clock: float, bandwidth: float,
    halves: float, float32: float,
) -> Chip:  # fmt: skip
    """Data sheets count an FMA as two operations."""
    specials = multiprocessors * SPECIALS_A_CLOCK * clock
    return Chip(name, source, multiprocessors, capability, bandwidth, halves / 2, float32 / 2, specials)


# For each multiprocessor, from 8.0 to 12.0: CUDA programming guide, "Throughput of Native Arithmetic Instructions".
SPECIALS_A_CLOCK = 16
CHIPS = {
    "H200": _chip(
        "H200 SXM", "NVIDIA's H200 data sheet (BF16 1979 T with sparsity, half of it without); boost clock 1.98 GHz",
        132, (9, 0), 1.98e9, 4.8e12, 989e12, 67e12,
    ),
    "A100": _chip(
        "A100 SXM 80 GB", "NVIDIA's A100 data sheet and white paper",
        108, (8, 0), 1.41e9, 2.039e12, 312e12, 19.5e12,
    ),
    "RTX4090": _chip(
        "GeForce RTX 4090", "NVIDIA's Ada white paper (FP16 with float32 sums, without sparsity)",
        128, (8, 9), 2.52e9, 1.008e12, 165.2e12, 82.6e12,
    ),
    "Orin": _chip(
        "Jetson AGX Orin 64 GB", "NVIDIA's Orin technical brief (INT8 170 T with sparsity: half types have a quarter)",
        16, (8, 7), 1.3e9, 0.2048e12, 42.5e12, 5.3e12,
    ),
}  # fmt: skip


def float32_lanes(capability: tuple[int, int]) -> int:
    """Of a multiprocessor: what it multiplies and adds a clock."""
    return 64 if capability == (8, 0) else 128


def least_times(work: Work, chip: Chip) -> dict[str, float]:
    """Seconds that each part of the chip needs, were it the only one."""
    return {
        "memory": work.moved / chip.bandwidth,
        "matrix": work.products / chip.products,
        "float32": work.operations / chip.operations,
        "special": work.specials / chip.specials,
    }


def least_time(work: Work, chip: Chip) -> tuple[float, str]:
    """Seconds, and the part of the chip that binds: all parts may work at once."""
    times = least_times(work, chip)
    binding = max(times, key=lambda part: times[part])
    return times[binding], binding


def floor(operator: Operator, dtype: str, sizes: Mapping[str, int], has: int) -> Work:
    """What any program must take for a node of these sizes (the contract's letters)."""
    elements = prod(sizes[letter] for letter in operator.inputs[0].dims)
    if not elements:
        return Work()
    read = sum(
        prod(sizes[letter] for letter in spec.dims) * BYTES[dtype if spec.activation else "float32"]
        for spec in operator.present(has)
    )
    written = elements * BYTES[dtype]
    if operator is SHORT_CONV:
        return Work(read, written, read, operations=elements * (sizes["K"] + SILU), specials=elements)
    B, L, N = (sizes[letter] for letter in "BLN")
    skip, gated = has & 1, has >> 1 & 1
    operations, specials, products = elements * (skip + gated), elements * gated, 0
    if operator is SELECTIVE_SCAN:
        operations += elements * (1 + N * PER_STATE)  # 1: the step times u
        specials += elements * (N + 1)
    else:
        products = 2 * N * elements
        specials += 2 * B * L * sizes["H"]
    if dtype == "float32":
        operations, products = operations + products, 0
    return Work(read, written, read, products, operations, specials)


def done(plan: Plan) -> Work:
    """What a plan takes."""
    return sum((work_of(launch) for launch in plan.launches), Work())


def work_of(launch: Launch) -> Work:
    count, dtype = COUNTS[launch.variant.kernel], launch.variant.dtype
    work = count(launch, BYTES[dtype])
    if dtype == "float32":
        work = dataclasses.replace(work, operations=work.operations + work.products, products=0)
    return dataclasses.replace(work, launches=1)


def _ssd_scan(launch: Launch, size: int) -> Work:
    n, has = launch.numbers, launch.numbers["has"]
    B, L, H, P, G, segments = (n[name] for name in ("B", "L", "H", "P", "G", "segments"))
    N, W, Q = (launch.variant.constants[name] for name in "NWQ")
    skip, gated, biased, masked, started = _present(has)
    blocks = launch.grid[0]
    chunks = blocks * _chunks(n, Q)
    x, states = B * L * H * P, B * segments * H * N * P
    per_head, per_token = 4 * (1 + skip + biased), 4 * masked
    return Work(
        read=size * (x * (1 + gated) + B * L * (2 * G * N + H)) + per_token * B * L + per_head * H
        + 4 * states * started,
        written=size * x,
        loaded=B * L * (size * H * P * (1 + gated) + blocks * (size * (2 * N + 1) + per_token))
        + prod(launch.grid) * per_head + 4 * states * started,
        products=chunks * Q * (Q * N + Q * W + 2 * N * W),
        operations=chunks * (PER_PAIR * Q * Q + Q * W * (3 + GATE * gated) + N * W + Q * STEP),
        specials=chunks * (Q * Q + 2 * Q + 1 + Q * STEP_SPECIALS + Q * W * GATE_SPECIALS * gated),
    )  # fmt: skip


def _ssd_segment_states(launch: Launch, size: int) -> Work:
    n = launch.numbers
    B, L, H, P, G, segments = (n[name] for name in ("B", "L", "H", "P", "G", "segments"))
    N, K, W, Q = (launch.variant.constants[name] for name in "NKWQ")
    _, _, biased, masked, _ = _present(n["has"])
    blocks = launch.grid[0]
    chunks = blocks * _chunks(n, Q)
    per_head, per_token = 4 * (1 + biased), 4 * masked
    return Work(
        read=size * B * L * (H * P + G * N + H) + per_token * B * L + per_head * H,
        written=4 * B * segments * H * (N * P + 1),
        loaded=B * L * blocks * (size * (W + K + 1) + per_token) + prod(launch.grid) * per_head,
        products=chunks * Q * K * W,
        operations=chunks * (Q * W + K * W + Q * STEP),
        specials=chunks * (Q + 1 + Q * STEP_SPECIALS),
    )


def _selective_scan(launch: Launch, size: int) -> Work:
    n = launch.numbers
    B, L, R, G, segments = (n[name] for name in ("B", "L", "R", "G", "segments"))
    N, W, Q = (launch.variant.constants[name] for name in "NWQ")
    skip, gated, biased, masked, started = _present(n["has"])
    D, blocks = G * R, launch.grid[0]
    tiles = blocks * _chunks(n, Q) * Q * W
    states = B * segments * D * N
    per_channel, per_token = 4 * (N + skip + biased), 4 * masked
    return Work(
        read=size * B * L * (D * (2 + gated) + 2 * G * N) + per_token * B * L + per_channel * D + 4 * states * started,
        written=size * B * L * D,
        loaded=B * L * (size * (D * (2 + gated) + blocks * 2 * N) + blocks * per_token)
        + B * segments * D * per_channel + 4 * states * started,
        operations=tiles * (N * PER_STATE + 2 + STEP + GATE * gated),
        specials=tiles * (N + STEP_SPECIALS + GATE_SPECIALS * gated),
    )  # fmt: skip


def _selective_segment_states(launch: Launch, size: int) -> Work:
    n = launch.numbers
    B, L, R, G, segments = (n[name] for name in ("B", "L", "R", "G", "segments"))
    N, W, Q = (launch.variant.constants[name] for name in "NWQ")
    _, _, biased, masked, _ = _present(n["has"])
    D, blocks = G * R, launch.grid[0]
    tiles = blocks * _chunks(n, Q) * Q * W
    per_channel, per_token = 4 * (N + biased), 4 * masked
    return Work(
        read=size * B * L * (2 * D + G * N) + per_token * B * L + per_channel * D,
        written=4 * B * segments * D * (N + 1),
        loaded=B * L * (size * (2 * D + blocks * N) + blocks * per_token) + B * segments * D * per_channel,
        operations=tiles * (N * INFLOW + 1 + STEP),
        specials=tiles * (N + STEP_SPECIALS),
    )


def _short_conv(launch: Launch, size: int) -> Work:
    n, biased = launch.numbers, launch.numbers["has"] & 1
    B, L, D = n["B"], n["L"], n["D"]
    K, W, T = (launch.variant.constants[name] for name in "KWT")
    blocks, tiles, _ = launch.grid
    seen = sum(min(tiles * T - back, L) for back in range(K))  # rows that the taps load, those past the end among them
    padded = B * blocks * W * tiles * T
    parameters = 4 * D * (K + biased)
    return Work(
        read=size * B * L * D + parameters,
        written=size * B * L * D,
        loaded=size * B * D * seen + B * tiles * parameters,
        operations=padded * (K + SILU),
        specials=padded * GATE_SPECIALS,
    )


def _carry_states(launch: Launch, size: int) -> Work:
    n, BLOCK = launch.numbers, launch.variant.constants["BLOCK"]
    B, segments, states = n["B"], n["segments"], n["size"]
    # Elements that share a number load it once for a program.
    rates, steps = (-(-states // min(n[per], BLOCK)) for per in ("per_A", "per_step"))
    return Work(
        read=4 * (states // n["per_A"] + B * segments * (states + states // n["per_step"])),
        written=4 * B * segments * states,
        loaded=4 * B * (rates + segments * (states + steps)),
        operations=launch.grid[0] * B * BLOCK * (1 + 2 * segments),
        specials=launch.grid[0] * B * BLOCK * segments,
    )


def _present(has: int) -> tuple[int, ...]:
    """1 or 0 for D, z, bias, mask and the start states."""
    return tuple(int(has & bit != 0) for bit in (1, 2, 4, 8, HAS_START))


def _chunks(numbers: Mapping[str, int], Q: int) -> int:
    """Of one block of all samples; a segment's last chunk may be cut."""
    whole, segment = numbers["segments"] - 1, numbers["segment"]
    last = numbers["L"] - whole * segment
    return numbers["B"] * (whole * -(-segment // Q) + -(-last // Q))


COUNTS: dict[str, Callable[[Launch, int], Work]] = {
    "ssd_scan": _ssd_scan,
    "ssd_segment_states": _ssd_segment_states,
    "selective_scan": _selective_scan,
    "selective_segment_states": _selective_segment_states,
    "short_conv": _short_conv,
    "carry_states": _carry_states,
}
