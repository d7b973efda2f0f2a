# Runs in a process of its own, with the rig's libraries: builds engines, and tells what memory they need.
#
# In: {"plugins": true, "jobs": [{"model": path, "shapes": {input: [least, usual, most]}}]}. Out: for each, bytes.

import contextlib
import json
import re
import sys

import tensorrt as trt


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.bytes = {}

    def log(self, severity, text):
        if found := re.match(r"Total (Weights|Activation) Memory: (\d+) bytes", text):
            self.bytes[found[1].lower()] = int(found[2])


def built(job, log):
    log.bytes = {}
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(job["model"])
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, three in job["shapes"].items():
        profile.set_shape(name, *three)
    assert config.add_optimization_profile(profile) >= 0
    assert builder.build_serialized_network(network, config) is not None
    return log.bytes


def main():
    request = json.load(sys.stdin)
    if request["plugins"]:
        from mdm.plugins.tensorrt.python_plugin import register

        register()
    log = Log()
    with contextlib.redirect_stdout(sys.stderr):
        told = [built(job, log) for job in request["jobs"]]
    json.dump(told, sys.stdout)


main()
