"""Which parts of a half-precision graph stay float32, in one table.

A graph is strongly typed: every node's type is written in the file, and no builder chooses another. Work of a role in
`ISLANDS` is float32 always; a scan's state, decay and softplus, the short convolution's sums and the parameters of both
are float32 by the operators' contract; everything else has the type asked for, unless its module path fits a pattern in
`fp32_layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mdm.plugins.errors import InputError

PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# role -> why it stays float32
ISLANDS: dict[str, str] = {
    "time": "sinusoids of times up to 1000, and one modulation for all blocks: no work, and every block scales by it",
    "norm": "sums of squares: in float16 they overflow at a root mean square of 256 / sqrt(width)",
    "stream": "49 blocks add to it: in half precision each addition rounds away the small updates",
    "ends": "latents in and noise out, a thousandth of the work; rounding here is rounding of the result",
    "solver": "coefficients near sigma 0 and alpha 0 differ in their last digits",
}
ROLES = ("mixer", "skip", "vae")  # what is done in the type asked for


@dataclass(frozen=True)
class Precision:
    name: str
    fp32_layers: tuple[str, ...] = ()  # patterns over module paths, as in 'backbone.blocks.48.*'

    @property
    def activations(self) -> str:
        """The type asked for."""
        return PRECISIONS[self.name]

    def dtype(self, role: str, path: str) -> str:
        if role in ISLANDS or self.keeps(path):
            return "float32"
        if role not in ROLES:
            raise KeyError(role)
        return self.activations

    def keeps(self, path: str) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in self.fp32_layers)


def make_precision(name: str, fp32_layers: Sequence[str] = ()) -> Precision:
    if name not in PRECISIONS:
        raise InputError(f"precision is {name!r}, expected one of: {', '.join(PRECISIONS)}")
    return Precision(name, tuple(fp32_layers))
