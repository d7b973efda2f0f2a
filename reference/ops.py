"""Our operators as torch custom ops, `torch.ops.mdm.selective_scan`, `.ssd_scan` and `.short_conv`.

They compute what the functions of `scan.py` and `short_conv.py` compute; the exporter sees each as one node. Names,
order of inputs and the checks of shapes come from the contract.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.library import custom_op

from mdm.plugins.contract import DOMAIN, SELECTIVE_SCAN, SHORT_CONV, SSD_SCAN, Operator
from mdm.plugins.errors import InputError
from mdm.reference import scan
from mdm.reference import short_conv as conv


def define(operator: Operator, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    names = [spec.name for spec in operator.inputs]
    numbers = {name: default for name, default in operator.attributes.items() if name != "has"}
    declared = [f"Tensor {spec.name}" for spec in operator.required]
    declared += [f"Tensor? {spec.name}=None" for spec in operator.optional]
    declared += [f"int {name}={default}" for name, default in numbers.items()]

    def compute(*values: Tensor | int | None) -> Tensor:
        checked(*values)
        return function(**dict(zip([*names, *numbers], values, strict=False))).contiguous()

    def checked(*values: Tensor | int | None) -> Tensor:
        """What a tracer runs: the shape of the result, and the errors."""
        given = {name: value for name, value in zip(names, values, strict=False) if isinstance(value, Tensor)}
        try:
            operator.check({name: known_sizes(tensor) for name, tensor in given.items()})
        except ValueError as error:
            raise InputError(str(error)) from error
        return torch.empty_like(given[names[0]], memory_format=torch.contiguous_format)

    op = custom_op(
        f"{DOMAIN}::{operator.torch_name}", compute, mutates_args=(), schema=f"({', '.join(declared)}) -> Tensor"
    )
    op.register_fake(checked)
    return op


def known_sizes(tensor: Tensor) -> list[int | None]:
    """The sizes of a tensor; None where tracing has a symbol for one."""
    return [size if isinstance(size, int) else None for size in tensor.shape]


selective_scan = define(SELECTIVE_SCAN, scan.selective_scan)
ssd_scan = define(SSD_SCAN, scan.ssd_scan)
short_conv = define(SHORT_CONV, conv.short_conv)
