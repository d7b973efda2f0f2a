"""What an error may be: a multiple of the noise floor where there is one, else a fixed table.

The floor is measured on the same inputs: the model in the graph's own types against the model in float64. A backend
that only adds up in another order stays within a small multiple of it; the figures behind the multiples are in the
README. Where a tensor has no floor of its own (what is copied is copied exactly), it is the rounding of its type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mdm.tools.check.finding import Difference, Limits

# Half the distance of neighbouring numbers, relative: what storing a tensor in that type costs at most.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "float64": 2.0**-53}

# Where no floor can be measured: of one evaluation, and of what a whole run ends with.
TABLE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 2e-1}
RUN_TABLE = {"fp32": 1e-3, "fp16": 1e-1, "bf16": 5e-1}
TIES = {"fp32": 0.01, "fp16": 0.1, "bf16": 0.5}  # logits, or shares of what a token moved, that near are a tie
MOST_RMS, MOST_WORST = 0.5, 1.0  # whatever the floor: an output of zeros has an error of 1


@dataclass(frozen=True)
class Multiples:
    """Of the floor."""

    rms: float = 4.0
    worst: float = 16.0

    def limits(self, floor: Difference, dtype: str) -> Limits:
        least = ROUNDING[dtype]
        return Limits(
            min(self.rms * max(floor.rms, least), MOST_RMS), min(self.worst * max(floor.worst, least), MOST_WORST),
            f"{self.rms:g} x floor in the mean, {self.worst:g} x at worst",
        )  # fmt: skip

    def limits_or(self, table: Limits, floor: Difference | None, dtype: str) -> Limits:
        """The table where there is no floor, or the model itself overflows in the deployed types."""
        return table if floor is None or floor.bad else self.limits(floor, dtype)


def steadied(floors: Sequence[Difference]) -> list[Difference]:
    """Each floor, or the median of five around it: one evaluation of a short text is too few roundings to tell, and so
    is a tensor whose values share a factor."""
    wide = []
    for k, floor in enumerate(floors):
        near = floors[max(0, k - 2) : k + 3]
        rms, worst = (float(np.median([getattr(one, name) for one in near])) for name in ("rms", "worst"))
        wide.append(replace(floor, rms=max(floor.rms, rms), worst=max(floor.worst, worst)))
    return wide


def amounts(error: Difference, limits: Limits) -> str:
    """Both numbers of each: either may be the one that is too large."""
    return (
        f"off by {error.rms:.2g} in the mean and {error.worst:.2g} at {list(error.at)}, "
        f"allowed are {limits.rms:.2g} and {limits.worst:.2g}"
    )


def table_limits(precision: str, run: bool = False) -> Limits:
    limit = (RUN_TABLE if run else TABLE)[precision]
    return Limits(limit, limit, f"table for {precision}")
