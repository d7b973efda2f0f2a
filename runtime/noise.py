"""Gaussian noise that depends on nothing but (seed, sample, stream): not on the batch, not on what was drawn before.

Philox is counter-based: seed and sample are its key, the stream stands in the counter. Stream 0 is the start, stream
1 + i what row i of a solver's table adds. Normals are made by Box and Muller in float64, then rounded to float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mdm.plugins.errors import InputError
from mdm.runtime.json_schema import told

START = 0
LARGEST = 2**64 - 1  # seed and sample are 64 bits each


def check_key(seed: int, sample: int) -> None:
    for name, value in (("seed", seed), ("sample", sample)):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
            raise InputError(f"{name} is {told(value)}, expected a whole number of 0 to {LARGEST}")


def normal(seed: int, sample: int, stream: int, shape: Sequence[int]) -> npt.NDArray[np.float32]:
    check_key(seed, sample)
    count = math.prod(shape)
    half = (count + 1) // 2
    bits = np.random.Philox(key=np.array([seed, sample], np.uint64), counter=[0, 0, stream, 0]).random_raw(2 * half)
    uniform = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53  # in (0,1]: its logarithm is finite
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * math.pi * uniform[half:]
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return pairs[:count].astype(np.float32).reshape(shape)
