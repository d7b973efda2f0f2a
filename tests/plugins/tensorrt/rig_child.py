# Runs in a process of its own, with the rig's libraries: parses models, builds engines, and tells of it.
#
# In: {"plugins": true, "jobs": [{"model": path, "profiles": [{"batch": [1, 2, 4], ...}, ...]}]}; no profiles: parse.
# "plugins" are ours in Python, or none, or those of the library of this path.
# Out: for each job what the parser said, how many nodes have plugins, the engine's bytes, and TensorRT's messages.

import contextlib
import json
import re
import struct
import sys

import onnx
import tensorrt as trt


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.said = []

    def log(self, severity, text):
        if severity <= trt.ILogger.WARNING:
            self.said.append(f"{severity.name}: {text}")


def attempt(job, log):
    log.said.clear()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse_from_file(job["model"])
    told = {"parsed": parsed, "errors": [parser.get_error(i).desc() for i in range(parser.num_errors)]}
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    told["plugins"] = sum(layer.type == trt.LayerType.PLUGIN_V3 for layer in layers)
    told["loops"] = sum(layer.type in (trt.LayerType.RECURRENCE, trt.LayerType.TRIP_LIMIT) for layer in layers)
    if parsed and job.get("profiles"):
        model = onnx.load(job["model"], load_external_data=False)
        dims = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
        config = builder.create_builder_config()
        for sizes in job["profiles"]:
            profile = builder.create_optimization_profile()
            for name, shape in dims.items():
                profile.set_shape(name, *([sizes[d][k] if isinstance(d, str) else d for d in shape] for k in range(3)))
            assert config.add_optimization_profile(profile) >= 0
        plan = builder.build_serialized_network(network, config)
        told["bytes"] = 0 if plan is None else plan.nbytes
        # `has` as it is stored, by value: name, INT32, one number.
        stored = re.findall(b"has\\0" + struct.pack("<ii", 5, 1) + b"(.{4})", bytes(plan or b""), re.DOTALL)
        told["has"] = sorted(int.from_bytes(value, "little") for value in stored)
    told["said"] = list(log.said)
    return told


def main():
    request = json.load(sys.stdin)
    if isinstance(request["plugins"], str):
        assert trt.get_plugin_registry().load_library(request["plugins"])
    elif request["plugins"]:
        from mdm.plugins.tensorrt.python_plugin import register

        register()
        register()  # the second time does nothing
    log = Log()
    with contextlib.redirect_stdout(sys.stderr):
        told = [attempt(job, log) for job in request["jobs"]]
    json.dump(told, sys.stdout)


main()
