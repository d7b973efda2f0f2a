"""What is tried and timed: nodes of our operators, and the goals they are held to. Pure data."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mdm.plugins.contract import ACTIVATIONS, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, Operator
from mdm.plugins.gpu.variants import CONV_TAPS, SELECTIVE_STATES, SHORTEST, SSD_STATES, Plan, choose
from mdm.tools.bench.operator_inputs import DECAYS

BLOCK = 7  # the optional inputs of every Mamba block: D, z, bias


@dataclass(frozen=True)
class Case:
    """One scan."""

    operator: Operator
    dtype: str
    sizes: Mapping[str, int]  # the contract's letters
    has: int
    decay: str = "typical"  # see operator_inputs

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}{size}" for letter, size in self.sizes.items())
        return f"{self.operator.torch_name} {self.dtype} {sizes} has{self.has} {self.decay}"


def ssd(B: int, L: int, H: int, P: int = 64, N: int = 128, G: int = 1) -> dict[str, int]:
    return {"B": B, "L": L, "H": H, "P": P, "G": G, "N": N}


def selective(B: int, L: int, D: int, G: int = 1) -> dict[str, int]:
    return {"B": B, "L": L, "D": D, "G": G, "N": 16}


def conv(B: int, L: int, D: int, K: int = 4) -> dict[str, int]:
    return {"B": B, "L": L, "D": D, "K": K}


LENGTHS = (1, 15, 64, 70, 333)
LONG = (2 * SHORTEST, 2 * SHORTEST + 1, 3 * SHORTEST - 7, 4 * SHORTEST + 188)  # these may be cut into segments


def named() -> list[Case]:
    """The sizes that are timed, with every optional input; those with a goal also as they are timed."""
    return [goal.case for goal in GOALS] + [dataclasses.replace(case, has=case.operator.has_all) for case in TIMED]


def small(count: int | None = None) -> list[Case]:
    """Every type, state, number of taps and `has`, once short and once long, the rest at random; or some of them."""
    rng = random.Random(0)
    kinds = [(SSD_SCAN, N) for N in SSD_STATES] + [(SELECTIVE_SCAN, N) for N in SELECTIVE_STATES]
    made = []
    for has, lengths, dtype, (operator, N) in itertools.product(range(16), (LENGTHS, LONG), ACTIVATIONS, kinds):
        B, L, G = rng.choice((1, 2, 3)), rng.choice(lengths), rng.choice((1, 2))
        if operator is SSD_SCAN:
            sizes = ssd(B, L, G * rng.choice((1, 2, 3)), rng.choice((32, 64, 96, 128)), N, G)
        else:
            sizes = selective(B, L, G * rng.choice((16, 48, 64, 112)), G)
        made.append(Case(operator, dtype, sizes, has, rng.choice(DECAYS)))
    for has, lengths, dtype, K in itertools.product(range(2), (LENGTHS, LONG), ACTIVATIONS, CONV_TAPS):
        sizes = conv(rng.choice((1, 2, 3)), rng.choice(lengths), rng.choice((16, 48, 128, 336)), K)
        made.append(Case(SHORT_CONV, dtype, sizes, has))
    return made if count is None else rng.sample(made, min(count, len(made)))


def plans(case: Case) -> Iterator[Plan]:
    """Every way in which some GPU would run the case: of each set of variants, the plan with the most programs."""
    found: dict[str, Plan] = {}
    for doublings, capability in itertools.product(range(13), ((8, 0), (9, 0))):
        plan = choose(case.operator, case.dtype, case.sizes, case.has, 2**doublings, capability)
        found[repr([launch.variant for launch in plan.launches])] = plan
    yield from found.values()


@dataclass(frozen=True)
class Goal:
    """Of one timed case, on an H200."""

    case: Case
    of_floor: float  # times the floor, at most
    rival: str
    faster: float  # than the rival, at least


MAMBA_SSD, MAMBA_SELECTIVE, COMPILED = "mamba-ssm Triton", "mamba-ssm CUDA", "torch.compile"
SSD_GOAL = Case(SSD_SCAN, "bfloat16", ssd(2, 1064, 64), BLOCK)
SELECTIVE_GOAL = Case(SELECTIVE_SCAN, "bfloat16", selective(2, 4494, 3072), BLOCK)
GOALS = (
    Goal(SSD_GOAL, of_floor=2.0, rival=MAMBA_SSD, faster=2.0),
    Goal(SELECTIVE_GOAL, of_floor=2.0, rival=MAMBA_SELECTIVE, faster=1.3),
)
TIMED = (
    SSD_GOAL,
    SELECTIVE_GOAL,
    *(
        Case(SSD_SCAN, dtype, sizes, BLOCK)
        for dtype, sizes in (
            ("bfloat16", ssd(1, 256, 64)),
            ("bfloat16", ssd(8, 1064, 64)),
            ("bfloat16", ssd(2, 1064, 64, N=64)),
            ("bfloat16", ssd(1, 4096, 16)),
            ("bfloat16", ssd(2, 4096, 64)),
            ("bfloat16", ssd(1, 16384, 16)),
            ("bfloat16", ssd(1, 16384, 128)),
            ("float32", ssd(2, 1064, 64)),
        )
    ),
    *(
        Case(SELECTIVE_SCAN, dtype, sizes, BLOCK)
        for dtype, sizes in (
            ("bfloat16", selective(1, 256, 2048)),
            ("bfloat16", selective(8, 1064, 3072)),
            ("bfloat16", selective(1, 4096, 1024)),
            ("bfloat16", selective(1, 16384, 1024)),
            ("float32", selective(2, 4494, 3072)),
        )
    ),
    Case(SHORT_CONV, "bfloat16", conv(2, 1064, 4352), 1),
    Case(SHORT_CONV, "bfloat16", conv(2, 4494, 3072, K=3), 1),
)
