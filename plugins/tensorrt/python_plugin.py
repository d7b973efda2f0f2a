"""The operators as TensorRT plugins in Python: `pip install tensorrt` and a driver are all they need.

    import tensorrt
    from mdm.plugins.tensorrt.python_plugin import register

    register()                     # before a model is parsed, and before an engine is loaded

TensorRT finds them by name, version and namespace, which the exported nodes carry as attributes. Where they are not
registered it takes the function body in the file. They hold Python's lock while they launch; an engine that is to run
without Python wants the C++ plugins.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorrt as trt

from mdm.plugins.contract import DOMAIN, OPERATORS, VERSION, Operator
from mdm.plugins.tensorrt.node import Described, Node, keeps_error

TYPES = {trt.DataType.FLOAT: "float32", trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}


def described(tensor: Any, dims: Any = None) -> Described:
    """Of a PluginTensorDesc, or of other dims with its type and layout."""
    return Described(
        tuple(tensor.dims if dims is None else dims),
        TYPES.get(tensor.type, ""),
        tensor.format == trt.TensorFormat.LINEAR,
    )


class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
    """One node. TensorRT clones it for each execution context."""

    def __init__(self, node: Node) -> None:
        for base in Plugin.__bases__:
            base.__init__(self)
        self.node = node
        self.plugin_name, self.plugin_version, self.plugin_namespace = node.operator.name, str(VERSION), DOMAIN
        self.num_outputs = 1
        self.timing_cache_id = f"has={node.has}"

    def get_capability_interface(self, type_: Any) -> Plugin:
        return self

    def clone(self) -> Plugin:
        return Plugin(self.node.clone())

    def attach_to_context(self, context: Any) -> Plugin:
        return self.clone()

    def get_fields_to_serialize(self) -> Any:
        has = trt.PluginField("has", np.array([self.node.has], np.int32), trt.PluginFieldType.INT32)
        return trt.PluginFieldCollection([has])

    def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
        self.node.expect(len(input_types))
        return [input_types[0]]

    def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
        return [trt.DimsExprs(inputs[0])]

    def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
        return self.node.takes(pos, [described(tensor.desc) for tensor in in_out])

    def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        self.node.check([described(tensor.desc, tensor.max) for tensor in inputs])

    def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
        return self.node.workspace([described(tensor.desc, tensor.max) for tensor in inputs])

    def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        with keeps_error():
            self.node.prepare([described(tensor) for tensor in inputs])

    def destroy(self) -> None:
        """TensorRT lets go of this one. The bindings (11.4) then free its C++ half twice if Python has no other
        reference, as after a build that fails: one stays, an empty one."""
        self.__dict__.clear()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def set_tactic(self, tactic: int) -> None:
        """There is one: which kernel serves which shape is decided by variants.py."""

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        with keeps_error():
            self.node.run([described(tensor) for tensor in input_desc], inputs, outputs[0], workspace, stream)


class Creator(trt.IPluginCreatorV3One):
    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator
        self.name, self.plugin_version, self.plugin_namespace = operator.name, str(VERSION), DOMAIN
        # TensorRT hands over only what is listed here.
        self.field_names = trt.PluginFieldCollection(
            [trt.PluginField(name, np.array([], np.int32), trt.PluginFieldType.INT32) for name in operator.attributes]
        )

    def create_plugin(self, name: str, fields: Any, phase: Any) -> Plugin:
        """From an ONNX node's attributes, or from what an engine's file has of a plugin. Absent ones have defaults."""
        given = {field.name: field.data for field in fields}
        has = given.get("has")
        return Plugin(Node(self.operator, self.operator.attributes["has"] if has is None else int(np.ravel(has)[0])))


_registered: list[Creator] = []  # TensorRT keeps pointers to them


def register() -> None:
    """Make the operators known to this process's TensorRT; a second time does nothing."""
    if _registered:
        return
    for operator in OPERATORS.values():
        creator = Creator(operator)
        trt.get_plugin_registry().register_creator(creator, DOMAIN)
        _registered.append(creator)
