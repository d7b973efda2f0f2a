"""Random inputs for the scans and the short convolution, as a trained model would have them or as a test wants them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from mdm.plugins.contract import Operator

Arrays = dict[str, NDArray[np.generic]]
DECAYS = ("typical", "strong", "none", "zero step")


def operator_inputs(
    operator: Operator,
    sizes: Mapping[str, int],
    has: int,
    dtype: str = "float32",
    decay: str = "typical",
    seed: int = 0,
) -> Arrays:
    """A value for each input. Activations have the type asked for, parameters and the mask are float32.

    `decay` is of a scan: "typical" has steps of 0.02 to 0.9 and A of -16 to -1; "strong" lets exp underflow at many
    tokens; "none" has A = 0; "zero step" has a step of exactly 0 everywhere.
    """
    rng = np.random.default_rng(seed)
    values: Arrays = {}
    for spec in operator.present(has):
        shape = [sizes[letter] for letter in spec.dims]
        value = rng.standard_normal(shape)
        if spec.name == "A":
            value = -rng.uniform(1, 16, shape) * {"strong": 30, "none": 0}.get(decay, 1)
        elif spec.name in ("delta", "dt"):
            value = -1000 + 0 * value if decay == "zero step" else value - 2
        elif spec.name.endswith("bias"):
            value = 0.5 * value
        elif spec.name in ("Bm", "C"):
            value = value / sizes["N"] ** 0.5 if sizes["N"] else value
        elif spec.name == "weight":
            value = value / sizes["K"] ** 0.5 if sizes["K"] else value
        elif spec.name == "mask":
            value = rng.integers(0, 2, shape).astype(np.float64)
        values[spec.name] = value.astype(dtype if spec.activation else "float32")
    return values
