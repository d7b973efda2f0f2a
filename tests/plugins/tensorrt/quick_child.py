# ruff: noqa: E402
# Runs in a process of its own, with the rig's libraries: asks an ahead-of-time plugin what TensorRT would ask.
#
# TensorRT-RTX takes no such plugins, but TensorRT's own Python code for them is here, and so are real expressions of
# shapes: a plugin of the kind that it does take (Probe) hands on those it gets, and makes what comes back the shapes of
# its outputs, whose values for a profile's smallest, usual and largest inputs TensorRT then tells.
#
# In: {"steps": [["quick", operator, has] or ["full"]], "probes": [{"operator": name, "has": number, "dtype": type,
# "integers": how many the kernel takes, "inputs": [[min, opt, max], ...], "halves": places of inputs that
# are float16 whatever the contract says}], "parse": [paths of models]}
# Out: what each step was refused with, for each probe and each of its tactics the kernel and three launches, what the
# parser said of each model, and which creators of ours TensorRT has in the end.

import json
import os
import sys

import numpy as np
import onnx
import tensorrt as trt

# TensorRT's warning that all this is experimental goes to the standard output, past Python.
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
# The rig's own package lacks what the real one has.
import tensorrt_bindings.plugin

trt.plugin = sys.modules["tensorrt.plugin"] = tensorrt_bindings.plugin

from mdm.plugins.contract import DOMAIN, OPERATORS
from mdm.plugins.errors import InputError
from mdm.plugins.tensorrt import python_plugin, quick

KINDS = {"float32": trt.DataType.FLOAT, "float16": trt.DataType.HALF, "bfloat16": trt.DataType.BF16}
LAUNCH = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")


def kept(expression, convert=tensorrt_bindings.plugin._tensor.SymExprImpl):
    """What a plugin writes is converted for TensorRT, which nothing in Python can read again."""
    convert(expression)
    return expression


tensorrt_bindings.plugin._tensor.SymExprImpl = kept


class Set:
    """Stands where TensorRT's objects do that a plugin writes its launch and its integers to."""

    def __setitem__(self, place, expression):
        self.__dict__[place] = expression


def plugin_of(name, has):
    creator = trt.get_plugin_registry().get_creator(name, "1", DOMAIN)
    assert [(field.name, field.type) for field in creator.field_names] == [("has", trt.PluginFieldType.INT64)]
    # As the parser gives it, whatever type a field is declared with.
    field = trt.PluginField("has", np.array([has], np.int32), trt.PluginFieldType.INT32)
    request = trt.QuickPluginCreationRequest.PREFER_AOT
    return creator.create_plugin(name, DOMAIN, trt.PluginFieldCollection([field]), trt.TensorRTPhase.BUILD, request)


def described(kind, shapes):
    """As a builder describes a tensor of a profile."""
    tensor = trt.DynamicPluginTensorDesc()
    least, usual, most = shapes
    tensor.desc.dims = trt.Dims([a if a == b else -1 for a, b in zip(least, most, strict=True)])
    tensor.desc.type, tensor.desc.format = kind, trt.TensorFormat.LINEAR
    tensor.min, tensor.opt, tensor.max = map(trt.Dims, (least, usual, most))
    return tensor


class Probe(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
    def __init__(self, asked, tensors, tactic):
        for base in Probe.__bases__:
            base.__init__(self)
        self.asked, self.tensors, self.tactic = asked, tensors, tactic
        self.plugin_name, self.plugin_version, self.plugin_namespace = "Probe", "1", "test"
        self.num_outputs = 1 + len(LAUNCH) + asked["integers"]
        self.told = {}

    def get_capability_interface(self, type_):
        return self

    def clone(self):
        made = Probe(self.asked, self.tensors, self.tactic)
        made.told = self.told
        return made

    attach_to_context = clone

    def get_fields_to_serialize(self):
        return trt.PluginFieldCollection([])

    def get_output_data_types(self, types):
        return [types[0]] * self.num_outputs

    def get_output_shapes(self, inputs, shape_inputs, builder):
        """As TensorRT goes through the questions, one tactic."""
        aot, count = plugin_of(self.asked["operator"], self.asked["has"]), len(inputs)
        kinds = [tensor.desc.type for tensor in self.tensors]
        assert aot.get_output_data_types(kinds[:-1], [len(shape) for shape in inputs]) == [kinds[0]]
        (y,) = aot.get_output_shapes(inputs, [], builder)
        combined = aot.get_supported_format_combinations(self.tensors, count)
        assert [(one.type, one.format) for one in combined] == [(kind, trt.TensorFormat.LINEAR) for kind in kinds]
        aot.configure_plugin(self.tensors[:-1], self.tensors[-1:])
        self.told["tactics"] = sorted(aot.get_valid_tactics())
        aot = aot.clone()
        aot.set_tactic(self.told["tactics"][self.tactic])
        launch, integers = Set(), Set()
        aot.get_launch_params(inputs, self.tensors, count, launch, integers, builder)
        name, ptx = aot.get_kernel([t.desc for t in self.tensors[:-1]], [t.desc for t in self.tensors[-1:]])
        self.told |= {"name": name, "ptx": ptx.decode()}
        told = [getattr(launch, name) for name in LAUNCH] + [vars(integers)[i] for i in range(integers.nbSymExprs)]
        one = builder.constant(1)  # no output without elements
        shapes = [trt.DimsExprs([builder.operation(trt.DimensionOperation.SUM, each._expr, one)]) for each in told]
        return [y, *shapes]

    def supports_format_combination(self, pos, in_out, num_inputs):
        return in_out[pos].desc.format == trt.TensorFormat.LINEAR

    def configure_plugin(self, inputs, outputs):
        assert [tuple(outputs[0].max)] == [tuple(inputs[0].max)]
        self.told["values"] = [
            [getattr(output, bound)[0] - 1 for output in outputs[1:]] for bound in ("min", "opt", "max")
        ]

    def get_workspace_size(self, inputs, outputs):
        return 0

    def on_shape_change(self, inputs, outputs):
        pass

    def set_tactic(self, tactic):
        pass

    def enqueue(self, *given):
        pass


class Creator(trt.IPluginCreatorV3One):
    def __init__(self):
        super().__init__()
        self.name, self.plugin_version, self.plugin_namespace = "Probe", "1", "test"
        self.field_names = trt.PluginFieldCollection([])
        self.next = None

    def create_plugin(self, name, fields, phase):
        return self.next


def attempt(asked, tactic, creator):
    operator = OPERATORS[asked["operator"]]
    kinds = [asked["dtype"] if spec.activation else "float32" for spec in operator.present(asked["has"])]
    for place in asked.get("halves", ()):
        kinds[place] = "float16"
    tensors = [described(KINDS[kind], shapes) for kind, shapes in zip(kinds, asked["inputs"], strict=True)]
    creator.next = probe = Probe(asked, [*tensors, tensors[0]], tactic)
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network, config = builder.create_network(0), builder.create_builder_config()
    parser, profile = trt.OnnxParser(network, log), builder.create_optimization_profile()
    assert parser.parse(model_of(kinds, tensors, probe.num_outputs))
    for place, tensor in enumerate(tensors):
        profile.set_shape(f"x{place}", tensor.min, tensor.opt, tensor.max)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    values = [
        {**dict(zip(LAUNCH, row, strict=False)), "integers": row[len(LAUNCH) :]} for row in probe.told.pop("values")
    ]
    return {**probe.told, "launches": values}


def model_of(kinds, tensors, outputs):
    """One Probe, by the parser: with these bindings TensorRT-RTX's networks take plugins from nowhere else."""
    types = {kind: getattr(onnx.TensorProto, kind.replace("float32", "float").upper()) for kind in kinds}

    def values(letter, dims):
        return [
            onnx.helper.make_tensor_value_info(f"{letter}{place}", types[kind], shape)
            for place, (kind, shape) in enumerate(dims)
        ]

    given = [[f"b{i}" if size < 0 else size for i, size in enumerate(tensor.desc.dims)] for tensor in tensors]
    inputs = values("x", zip(kinds, given, strict=True))
    made = values("y", [(kinds[0], given[0]), *[(kinds[0], [f"s{i}"]) for i in range(outputs - 1)]])
    names = [[value.name for value in some] for some in (inputs, made)]
    node = onnx.helper.make_node("Probe", *names, domain="test", plugin_namespace="test", plugin_version="1")
    graph = onnx.helper.make_graph([node], "probe", inputs, made)
    sets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("test", 1)]
    return onnx.helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()


def main():
    request = json.load(sys.stdin)
    creator = Creator()
    trt.get_plugin_registry().register_creator(creator, "test")
    refused = [step(*words) for words in request["steps"]]
    probes = []
    for asked in request["probes"]:
        first = attempt(asked, 0, creator)
        probes.append([first, *(attempt(asked, 1 + more, creator) for more in range(len(first["tactics"]) - 1))])
    creators = [one for one in trt.get_plugin_registry().all_creators if one.plugin_namespace == DOMAIN]
    told = {
        "refused": refused,
        "probes": probes,
        "parsed": [parse(path) for path in request["parse"]],
        "creators": {one.name: type(one).__name__ for one in creators},
    }
    with answer:
        json.dump(told, answer)


def step(kind, *words):
    try:
        if kind == "full":
            python_plugin.register()
        else:
            quick.register(OPERATORS[words[0]], words[1])
    except InputError as error:
        return str(error)
    return ""


def parse(path):
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    parser.parse_from_file(path)
    return [parser.get_error(i).desc() for i in range(parser.num_errors)]


main()
