"""Other ways to the same scans: mamba-ssm's kernels where that package is, and torch.compile of our chunked form.

Each takes a case and its inputs, and gives a call and how to bring its result into our layout. mamba-ssm has its own
layouts; it gets tensors in them, so that no transposition is timed. It has no mask.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mdm.plugins.contract import SHORT_CONV, SSD_SCAN
from mdm.plugins.errors import EnvironmentLackError
from mdm.tools.gpu_check.cases import COMPILED, MAMBA_SELECTIVE, MAMBA_SSD, Case
from mdm.tools.gpu_check.verify import REFERENCES

Call = Callable[[], Tensor]
ToOurs = Callable[[Tensor], Tensor]
MAMBA_CHUNKS = (256, 128)  # its default, and the next; the faster counts
CHUNKS = 16  # of the compiled form: it unrolls the recurrence over them, and compiles for minutes where there are more


def calls(case: Case, given: Mapping[str, Tensor], name: str) -> list[tuple[Call, ToOurs]]:
    """The ways of one rival, of which the fastest counts. Raises where the rival is not there."""
    if name == COMPILED:
        return [compiled(case, given)]
    if name == MAMBA_SSD:
        return [mamba_ssd(given, chunk) for chunk in MAMBA_CHUNKS]
    return [mamba_selective(given)]


def rivals_of(case: Case) -> tuple[str, ...]:
    if case.operator is SHORT_CONV:
        return (COMPILED,)
    return (MAMBA_SSD if case.operator is SSD_SCAN else MAMBA_SELECTIVE, COMPILED)


def compiled(case: Case, given: Mapping[str, Tensor]) -> tuple[Call, ToOurs]:
    chunk = max(64, 1 << (-(-case.sizes["L"] // CHUNKS) - 1).bit_length())
    fast = torch.compile(REFERENCES[case.operator.torch_name], dynamic=False)
    how = {} if case.operator is SHORT_CONV else {"chunk_size": chunk}
    return lambda: fast(**given, **how), lambda y: y


def mamba_ssd(given: Mapping[str, Tensor], chunk: int) -> tuple[Call, ToOurs]:
    run = _mamba("ops.triton.ssd_combined").mamba_chunk_scan_combined
    names = ("x", "dt", "A", "Bm", "C")
    more = {name: given[name] for name in ("D", "z", "dt_bias") if name in given}
    return lambda: run(*(given[name] for name in names), chunk, dt_softplus=True, **more), lambda y: y


def mamba_selective(given: Mapping[str, Tensor]) -> tuple[Call, ToOurs]:
    run = _mamba("ops.selective_scan_interface").selective_scan_fn

    def by_channel(name: str) -> Tensor | None:
        return given[name].transpose(1, 2).contiguous() if name in given else None  # [B,D,L]

    u, delta, z = (by_channel(name) for name in ("u", "delta", "z"))
    Bm, C = (given[name].permute(0, 2, 3, 1).contiguous() for name in ("Bm", "C"))  # [B,G,N,L]
    more: dict[str, Any] = {"D": given.get("D"), "z": z, "delta_bias": given.get("delta_bias")}
    return lambda: run(u, delta, given["A"], Bm, C, delta_softplus=True, **more), lambda y: y.transpose(1, 2)


def _mamba(module: str) -> Any:
    """A module of mamba-ssm, without the package's own `__init__`, which wants transformers."""
    spec = find_spec("mamba_ssm")
    if spec is None:
        raise EnvironmentLackError("mamba-ssm is not installed")
    if "mamba_ssm" not in sys.modules:
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations or ())
        package.__spec__ = spec
        sys.modules["mamba_ssm"] = package
    try:
        return import_module(f"mamba_ssm.{module}")
    except ImportError as error:
        raise EnvironmentLackError(f"mamba-ssm is here, but {error}") from error
