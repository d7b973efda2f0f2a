"""Experimental: the operators as TensorRT's ahead-of-time plugins, for engines that run without Python and without our
C++ library, as in trtexec: such an engine holds the kernels' PTX, and TensorRT launches it.

    from mdm.plugins.tensorrt import python_plugin, quick

    quick.register(SHORT_CONV, has=1)     # for nodes with these optional inputs, before a model is parsed
    python_plugin.register()              # the other operators, if any: TensorRT keeps the first plugin of a name

Our C++ library does not load into a process that has one of these: TensorRT refuses it as a whole.

Experimental by TensorRT's own word, and open: TensorRT 11.1 and 11.2.1 load a CUDA module at each change of shape and
never unload it (github.com/NVIDIA/TensorRT/issues/4849). So for engines of one shape, or few requests. TensorRT-RTX
imports no such plugins.

TensorRT launches one kernel, gives it no workspace, and passes the inputs' pointers, then integers, then the output's
pointer. So a node is one launch of the shipped PTX, whose parameters are declared anew in that order:
* The short convolution is one launch anyhow.
* A scan is never cut into segments, as others are whose programs would leave half of the multiprocessors idle. Counted
  for an H200 at B = 1, L = 4096, not measured: 2.2 times as long for Mamba-1 of D = 1024, 1.3 times for Mamba-2 of
  H = 16, P = 64, N = 128.
* Mamba-2's chunks have 32 tokens, as all of the PTX has: the cubins for 9.0, 10.0 and 11.0 multiply 64 rows at once.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import GenericAlias
from typing import Any

import tensorrt as trt

from mdm.plugins.contract import ACTIVATIONS, DOMAIN, VERSION, Operator
from mdm.plugins.errors import EnvironmentLackError, InputError
from mdm.plugins.gpu.pack import PTX, SHIPPED, Pack
from mdm.plugins.gpu.variants import UNIT, Launch, Variant, choose, ssd_variant, ssd_widths
from mdm.plugins.tensorrt.node import Described, Node
from mdm.plugins.tensorrt.ptx import for_inputs
from mdm.plugins.tensorrt.python_plugin import TYPES

CAPABILITY = (8, 0)  # of the pack's PTX
DYNAMIC = "BL"  # what may change from run to run. Of other sizes kernels want multiples, which TensorRT does not check
COMBINED = {trt.DataType.FLOAT: "FP32", trt.DataType.HALF: "FP16", trt.DataType.BF16: "BF16"}  # in combinations

_registered: dict[str, int] = {}  # by operator: `has`


def register(operator: Operator, has: int) -> None:
    """Make known to this process's TensorRT an operator whose nodes have these optional inputs; a second time does
    nothing."""
    name, plugin = operator.name, Quick(operator, has)
    if _registered.get(name) == has:
        return
    there = {(c.name, c.plugin_version, c.plugin_namespace) for c in trt.get_plugin_registry().all_creators}
    if (name, str(VERSION), DOMAIN) in there:
        found = f"this one, for has = {_registered[name]}" if name in _registered else "the Python or C++ plugin"
        raise InputError(
            f"{name}: TensorRT has a plugin of this name already, and would keep that one\n"
            f"found {found}, expected none\nregister an ahead-of-time plugin first, in a process of its own"
        )
    plugins = tensorrt_plugin()
    tensors = {spec.name: plugins.TensorDesc for spec in plugin.node.inputs}
    outputs = {"outputs": GenericAlias(tuple, (plugins.TensorDesc,))}
    combinations = GenericAlias(list, (plugins.AutoTuneCombination,))
    kernel = GenericAlias(tuple, (str, str, plugins.KernelLaunchParams, plugins.SymIntExprs))
    identity = f"{DOMAIN}::{name}"
    plugins.register(identity)(typed(plugin.describe, tensors | {"has": int}, plugins.TensorDesc))
    plugins.autotune(identity)(typed(plugin.autotune, tensors | outputs, combinations))
    plugins.aot_impl(identity)(typed(plugin.kernel, tensors | {"has": int} | outputs | {"tactic": int}, kernel))
    _registered[name] = has


def tensorrt_plugin() -> Any:
    """TensorRT's module for such plugins. When it is imported it says that it is experimental."""
    try:
        import tensorrt.plugin as plugins
    except ImportError:
        plugins = None
    if not hasattr(plugins, "KernelLaunchParams"):
        raise EnvironmentLackError(
            f"TensorRT {trt.__version__} has no ahead-of-time plugins in Python\n"
            "found no tensorrt.plugin.KernelLaunchParams\nuse a newer TensorRT, or the Python or C++ plugins"
        )
    return plugins


def typed(function: Callable[..., Any], arguments: Mapping[str, Any], returns: Any) -> Callable[..., Any]:
    """The function with this signature, which TensorRT reads: an operator's inputs are known only at run time."""

    def called(*given: Any, **named: Any) -> Any:
        return function(*given, **named)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=type_) for name, type_ in arguments.items()]
    called.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return called


class Quick:
    """What TensorRT asks, while it builds an engine, of an operator's nodes with these optional inputs."""

    def __init__(self, operator: Operator, has: int) -> None:
        self.operator, self.has, self.node = operator, has, Node(operator, has)

    def describe(self, *tensors: Any, has: int = 0) -> Any:
        """The output, which is like the first input."""
        name = self.operator.name
        if has != self.has:
            raise InputError(
                f"{name}: found a node with has = {has}, expected {self.has}, for which it is registered\n"
                "a file has one pattern of an operator: register that, and build in a process of its own"
            )
        self.node.expect(len(tensors))
        types = [Described((), TYPES.get(tensor.dtype, "")) for tensor in (*tensors, tensors[0])]
        for place, spec in enumerate(self.node.inputs):
            if not self.node.takes(place, types):
                raise InputError(
                    f"{name}: input '{spec.name}' has the type {tensors[place].dtype}\n"
                    f"expected float32 for parameters and the mask, and for activations one of {', '.join(ACTIVATIONS)}"
                )
        return tensors[0].like()

    def autotune(self, *given: Any) -> list[Any]:
        """The network's types in plain memory. A tactic is the width of a kernel's blocks: TensorRT times each."""
        *tensors, (output,) = given
        types = ",".join(COMBINED[tensor.dtype] for tensor in (*tensors, output))
        return [tensorrt_plugin().AutoTuneCombination(types, "LINEAR", [*variants(self.largest(tensors))])]

    def kernel(self, *given: Any) -> tuple[str, str, Any, Any]:
        """A tactic's function and PTX, how it is launched for any shape, and its integer arguments."""
        tensors, tactic, plugins = given[: len(self.node.inputs)], given[-1], tensorrt_plugin()
        launch = self.largest(tensors)
        pack = Pack.open(SHIPPED)
        entry = pack.entry(variants(launch)[tactic])
        B, L, *_ = tensors[0].shape_expr
        known = {**launch.numbers, **entry.constants, "B": B, "L": L, "segment": plugins.cdiv(L, UNIT) * UNIT}

        text, integers = for_inputs(pack, entry, [spec.name for spec in self.node.inputs])
        grid = [size_in(rule, known, plugins) for rule in entry.grid]
        params = plugins.KernelLaunchParams(*grid, block_x=32 * entry.warps, shared_mem=entry.images[PTX].shared)
        numbers = tuple(plugins.SymInt32(known[name]) for name in integers)
        return entry.symbol, text, params, plugins.SymIntExprs.from_tuple(numbers)

    def largest(self, tensors: Sequence[Any]) -> Launch:
        """The launch for the profile's largest shapes: on one multiprocessor a plan has no second."""
        shapes = [tensor.shape.max if tensor.shape.is_dynamic else tensor.shape for tensor in tensors]
        sizes = self.node.sizes([Described(tuple(shape), "") for shape in shapes])
        for spec, tensor in zip(self.node.inputs, tensors, strict=True):
            for letter, size in zip(spec.dims, tensor.shape, strict=True):
                if size < 0 and letter not in DYNAMIC:
                    raise InputError(
                        f"{self.operator.name}: input '{spec.name}' has no fixed {letter}\n"
                        f"expected a network in which only {' and '.join(DYNAMIC)} change\n"
                        "use the Python or C++ plugins"
                    )
        plan = choose(self.operator, TYPES[tensors[0].dtype], sizes, self.has, 1, CAPABILITY)
        (launch,) = plan.launches
        return launch


def variants(launch: Launch) -> dict[int, Variant]:
    """What computes the same, by the width of its blocks; any serves every shape."""
    given = launch.variant
    if given.kernel != "ssd_scan":
        return {given.constants["W"]: given}
    N, Q, P = given.constants["N"], given.constants["Q"], launch.numbers["P"]
    return {W: ssd_variant(given.dtype, N, W, Q) for W in ssd_widths(given.dtype, N) if P % W == 0}


def size_in(rule: str, known: Mapping[str, Any], plugins: Any) -> Any:
    """`variants.size_of` for sizes that are TensorRT's expressions."""
    size = plugins.ShapeExpr(1)
    for sign, name in re.findall(r"([*/]?)(\w+)", rule):
        number = int(name) if name.isdigit() else known[name]
        size = plugins.cdiv(size, number) if sign == "/" else size * number
    return size
