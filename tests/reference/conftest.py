"""The fixture `mamba_ssm`: the mamba-ssm package as an independent oracle on the CPU (tools/install-mamba-ssm).

Its package `__init__` wants transformers and two CUDA extensions, so the extensions are replaced by empty modules and
`__init__` is stepped over. Its fused kernels need a GPU; where its modules would call one, they are given the package's
own plain reference function. Tests that use the fixture are skipped where the package is not installed.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

NEEDED = ("mamba_ssm", "einops", "triton", "huggingface_hub")


@pytest.fixture(scope="session")
def mamba_ssm() -> SimpleNamespace:
    """Its reference functions, and its Mamba and Mamba2 modules running on them."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        pytest.skip(f"no module '{lacking[0]}': run tools/install-mamba-ssm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _load()


def _load() -> SimpleNamespace:
    for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
        if find_spec(extension) is None:
            sys.modules[extension] = types.ModuleType(extension)
    spec = find_spec("mamba_ssm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    sys.modules["mamba_ssm"] = package

    scan, ssd, minimal, norm, mamba, mamba2 = (
        importlib.import_module(f"mamba_ssm.{name}")
        for name in (
            "ops.selective_scan_interface", "ops.triton.ssd_combined", "modules.ssd_minimal",
            "ops.triton.layernorm_gated", "modules.mamba_simple", "modules.mamba2",
        )
    )  # fmt: skip

    def padded_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **options: Any) -> Tensor:
        """The reference wants whole chunks: pad at the end, which a causal scan does not notice, and crop."""
        length = x.shape[1]
        spare = -length % chunk_size
        x, B, C = (F.pad(tensor, (0, 0, 0, 0, 0, spare)) for tensor in (x, B, C))
        if options.get("z") is not None:
            options["z"] = F.pad(options["z"], (0, 0, 0, 0, 0, spare))
        known = {key: options[key] for key in ("D", "z", "dt_bias", "dt_softplus") if key in options}
        y: Tensor = ssd.ssd_chunk_scan_combined_ref(x, F.pad(dt, (0, 0, 0, spare)), A, B, C, chunk_size, **known)
        return y[:, :length]

    def gated_norm(self: Any, x: Tensor, z: Tensor | None = None) -> Tensor:
        y: Tensor = norm.rms_norm_ref(
            x, self.weight, self.bias, z=z, eps=self.eps, group_size=self.group_size,
            norm_before_gate=self.norm_before_gate,
        )  # fmt: skip
        return y

    mamba.selective_scan_fn = scan.selective_scan_ref
    mamba.causal_conv1d_fn = mamba2.causal_conv1d_fn = None
    mamba2.mamba_chunk_scan_combined = padded_ssd
    norm.RMSNorm.forward = gated_norm
    return SimpleNamespace(
        selective_scan=scan.selective_scan_ref,
        ssd=padded_ssd,
        ssd_minimal=minimal.ssd_minimal_discrete,
        Mamba=mamba.Mamba,
        Mamba2=mamba2.Mamba2,
    )
