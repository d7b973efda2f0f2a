"""A kernel's PTX with the parameters that another launcher passes.

    declared = ("x", "weight", "bias", "y", "L")
    text = with_parameters(text, "short_conv", declared, given=("x", "weight", "L", "y"), instead={"bias": "y"})

A kernel declares its parameters in order, and its code reads each by its name. So they may be declared in another order
and left out, and what was read from one may be read from another: no instruction changes but the names in such reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mdm.plugins.errors import EngineError
from mdm.plugins.gpu.pack import PTX, Entry, Pack


def for_inputs(pack: Pack, entry: Entry, inputs: Sequence[str]) -> tuple[str, list[str]]:
    """The PTX of an entry as TensorRT launches it with these inputs, and the names of its integers. Where an input is
    absent y's pointer stands: `has` tells the kernel not to follow it."""
    integers = [argument.name for argument in entry.arguments if argument.kind == "i32"]
    absent = [a.name for a in entry.arguments if a.kind == "pointer" and a.name not in (*inputs, "y")]
    text = with_parameters(
        pack.read(entry, PTX).rstrip(b"\0").decode(),
        entry.symbol,
        kernel=[argument.name for argument in entry.arguments],
        given=[*inputs, *integers, "y"],
        instead=dict.fromkeys(absent, "y"),
    )
    return text, integers


def with_parameters(
    ptx: str, symbol: str, kernel: Sequence[str], given: Sequence[str], instead: Mapping[str, str]
) -> str:
    """`kernel` names what is declared, `given` what shall be declared; what of the rest is read, `instead` gives."""
    found = re.fullmatch(rf"(.*\.entry {symbol}\()([^)]*)(\).*)", ptx, re.DOTALL)
    written = [text.rstrip() for text in found[2].split(",")] if found else []
    names = {name: f"{symbol}_param_{place}" for place, name in enumerate(kernel)}
    if found is None or [text.split()[-1:] for text in written] != [[name] for name in names.values()]:
        raise EngineError(
            f"the PTX of '{symbol}' has {len(written)} parameters of its own order\nexpected {', '.join(kernel)}"
        )
    declared = dict(zip(kernel, written, strict=True))
    start, end = f"{found[1]}{','.join(declared[name] for name in given)}\n", found[3]
    for name in (name for name in kernel if name not in given):
        if name in instead:
            end = end.replace(f"[{names[name]}]", f"[{names[instead[name]]}]")
        if re.search(rf"\b{names[name]}\b", end):
            raise EngineError(f"the PTX of '{symbol}' reads its parameter '{name}', which is not given")
    return start + end
