"""Which backends there are."""

from __future__ import annotations

from mdm.plugins.errors import InputError
from mdm.runtime.backend import Backend
from mdm.runtime.bundle import Bundle
from mdm.runtime.ort import PROVIDERS, OrtBackend
from mdm.runtime.words import nearest

TENSORRT = "tensorrt"
BACKENDS = (*PROVIDERS, TENSORRT)


def backend_for(
    bundle: Bundle,
    name: str = "ort-cpu",
    threads: int | None = None,
    memory: int | None = None,
    device: int = 0,
    profile: str | None = None,
) -> Backend:
    """A backend with a bundle.

    `threads` of the CPU, default as many as the process may use; `memory`: bytes that loaded graphs may take together,
    on a GPU each; graphs that do not fit in beside each other are loaded again whenever their turn comes. `device`: the
    GPU's number. `profile`: of TensorRT's engines those built with it, else the newest.
    """
    if name not in BACKENDS:
        raise InputError(f"unknown backend '{name}'{nearest(name, BACKENDS)}\nbackends: {', '.join(BACKENDS)}")
    if profile is not None and name != TENSORRT:
        raise InputError(
            f"backend '{name}' has no profiles\nleave the profile out: it chooses among TensorRT's engines"
        )
    if name != TENSORRT:
        return OrtBackend(bundle, name, threads=threads, memory=memory, device=device)
    if threads is not None:
        raise InputError(f"backend '{name}' runs on a GPU, and takes no threads")
    from mdm.runtime.tensorrt.backend import TensorRtBackend

    return TensorRtBackend(bundle, memory, device, profile)
