"""The ONNX parser, and the network it fills: each node goes to a plugin, an importer of TensorRT's, or its function.

In TensorRT's order: a plugin where the node names a namespace and one is registered; an importer by the operator's name
alone, here for all of the standard domain; a function of the file. Before 10.7 the function comes first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .enums import DataType, LayerType, NetworkDefinitionCreationFlag, OnnxParserFlag, Severity, TensorRTPhase
from .plan import VERSION, Dims
from .plugins import plugin_of
from .words import needs, say, use

# onnx.TensorProto's numbers
TYPES = {
    1: DataType.FLOAT, 2: DataType.UINT8, 3: DataType.INT8, 6: DataType.INT32, 7: DataType.INT64, 9: DataType.BOOL,
    10: DataType.HALF, 16: DataType.BF16,
}  # fmt: skip
LAYERS = {
    "MatMul": [LayerType.MATRIX_MULTIPLY], "Gemm": [LayerType.MATRIX_MULTIPLY], "Cast": [LayerType.CAST],
    "Constant": [LayerType.CONSTANT],
    "Loop": [LayerType.TRIP_LIMIT, LayerType.RECURRENCE, LayerType.LOOP_OUTPUT],
    "Scan": [LayerType.TRIP_LIMIT, LayerType.RECURRENCE, LayerType.LOOP_OUTPUT],
}  # fmt: skip


VERSION_NUMBERS = tuple(map(int, VERSION.split(".")[:2]))


class ITensor:
    """An input or output of a network."""

    __slots__ = ("_sizes", "dtype", "name")

    def __init__(self, value: Any) -> None:
        tensor = value.type.tensor_type
        self.name, self.dtype = value.name, TYPES[tensor.elem_type]
        # None: the file does not say, and what it comes to is seen when the shapes of all inputs are known.
        self._sizes: list[int | str] | None = None
        if tensor.HasField("shape"):
            self._sizes = [d.dim_param or d.dim_value for d in tensor.shape.dim]

    @property
    def shape(self) -> Dims:
        return Dims(size if isinstance(size, int) else -1 for size in self._sizes or ())


class ILayer:
    """Also what a plugin's layer is handed out as, until its __class__ is set."""

    __slots__ = ("_plugin", "metadata", "name", "type")

    def __init__(self, name: str, type: LayerType, plugin: Any = None) -> None:
        self.name, self.type, self.metadata, self._plugin = name, type, "", plugin


class IPluginV3Layer(ILayer):
    __slots__ = ()

    plugin = property(lambda self: self._plugin)


class INetworkDefinition:
    __slots__ = ("_content", "_inputs", "_layers", "_model", "_outputs", "_source", "flags", "name")

    def __init__(self, flags: int) -> None:
        self.flags, self.name = flags, "Unnamed Network 0"
        self._inputs: list[ITensor] = []
        self._outputs: list[ITensor] = []
        self._layers: list[ILayer] = []
        self._content = b""
        self._model: Any = None  # the content as an onnx.ModelProto
        self._source: Path | None = None  # the folder of its weights

    num_layers = property(lambda self: len(self._layers))
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def get_flag(self, flag: NetworkDefinitionCreationFlag) -> bool:
        return bool(self.flags >> int(flag) & 1)

    def get_layer(self, index: int) -> ILayer:
        return self._layers[index]

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]


class ParserError:
    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OnnxParser:
    __slots__ = ("_errors", "_flags", "_network")

    def __init__(self, network: INetworkDefinition, logger: Any) -> None:
        use(logger)
        self._network, self._errors = needs(network, INetworkDefinition, "OnnxParser"), list[ParserError]()
        self._flags: set[OnnxParserFlag] = set()

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def set_flag(self, flag: OnnxParserFlag) -> None:
        self._flags.add(needs(flag, OnnxParserFlag, "set_flag"))

    def get_flag(self, flag: OnnxParserFlag) -> bool:
        return flag in self._flags

    def parse_from_file(self, model: str) -> bool:
        path = Path(needs(model, str, "parse_from_file"))
        if not path.is_file():
            return self._refuse(f"Failed to open file: {model}")
        return self.parse(path.read_bytes(), model)

    def parse(self, model: Any, path: str | None = None) -> bool:
        """`path` is where the model would lie: its weights are looked for beside it."""
        import onnx
        from google.protobuf.message import DecodeError

        network = self._network
        if network.num_layers:
            return self._refuse("the network is not empty")
        try:
            content = bytes(memoryview(model))
            parsed = onnx.load_model_from_string(content)
        except DecodeError:
            return self._refuse("Failed to parse the ONNX model")
        source = Path(path).resolve().parent if path else None
        for tensor in parsed.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                file = {one.key: one.value for one in tensor.external_data}["location"]
                if source is None or not (source / file).is_file():
                    return self._refuse(f"Failed to open file: {file}, for the weights {tensor.name}")
        values = [*parsed.graph.input, *parsed.graph.output]
        types = {*(v.type.tensor_type.elem_type for v in values), *(t.data_type for t in parsed.graph.initializer)}
        if types - {*TYPES}:
            return self._refuse(f"unsupported types of tensors: {types - {*TYPES}}")
        functions = {function.name: function for function in parsed.functions}
        for node in parsed.graph.node:
            if not self._import(node, functions):
                return False
        network._inputs = [ITensor(value) for value in parsed.graph.input]
        network._outputs = [ITensor(value) for value in parsed.graph.output]
        network._content, network._model, network._source = content, parsed, source
        return True

    def _import(self, node: Any, functions: dict[str, Any]) -> bool:
        attributes = {one.name: one for one in node.attribute}
        layers = self._network._layers
        function_first = VERSION_NUMBERS < (10, 7) and node.op_type in functions
        if "plugin_namespace" in attributes and not function_first:
            if "" in node.input:
                return self._refuse(f"In node {node.name}: a plugin's input is empty")
            version = attributes["plugin_version"].s.decode() if "plugin_version" in attributes else "1"
            key = (node.op_type, version, attributes["plugin_namespace"].s.decode())
            fields = {name: [one.i] for name, one in attributes.items() if one.type == 2}  # ints
            try:
                plugin = plugin_of(key, fields, TensorRTPhase.BUILD)
            except Exception as failure:
                return self._refuse(f"In node {node.name}: creating the plugin {key[0]} failed: {failure}")
            if plugin is not None:
                layers.append(ILayer(node.name, LayerType.PLUGIN_V3, plugin))
                return True
        if node.domain in ("", "ai.onnx"):
            layers.extend(ILayer(node.name, type) for type in LAYERS.get(node.op_type, [LayerType.ELEMENTWISE]))
            return True
        if node.op_type not in functions:
            return self._refuse(
                f"In node {node.name} of {node.op_type}: Plugin not found, are the plugin name, version, and namespace "
                "correct?"
            )
        return all(self._import(inner, functions) for inner in functions[node.op_type].node)

    def _refuse(self, text: str) -> bool:
        self._errors.append(ParserError(text))
        say(Severity.ERROR, f"ModelImporter: {text}")
        return False
