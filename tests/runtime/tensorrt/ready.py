# For forbidden.py: an engine that is ready to run, and the list of cases.

import ctypes
import sys

import numpy as np
import tensorrt as trt

from mdm.plugins.gpu.driver import Device, Driver

STATIC, ON_CHANGE, USER = trt.ExecutionContextAllocationStrategy.__members__.values()
MODEL = sys.argv[1]
ROW = 16  # bytes
CASES = []
STREAMS = []


class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.said = []

    def log(self, severity, text):
        self.said.append(text)


LOG = Log()


def build(*flags, profiles=((1, 2, 4), (1, 8, 16))):
    builder = trt.Builder(LOG)
    network, config = builder.create_network(), builder.create_builder_config()
    assert trt.OnnxParser(network, LOG).parse_from_file(MODEL)
    for flag in flags:
        config.set_flag(getattr(trt.BuilderFlag, flag))
    for batches in profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape("x", *((batch, 4) for batch in batches))
        assert config.add_optimization_profile(profile) >= 0
    plan = builder.build_serialized_network(network, config)
    return None if plan is None else bytes(plan)


class Ready:
    """An engine with its context, a stream, and buffers for 16 rows; nothing is missing for a run of 2."""

    def __init__(self, *flags, strategy=STATIC, budget=None):
        self.engine = trt.Runtime(LOG).deserialize_cuda_engine(build(*flags))
        if budget is not None:
            self.engine.weight_streaming_budget_v2 = budget
        self.context = self.engine.create_execution_context(strategy)
        self.stream, self.other = (driver.handle("cuStreamCreate", 1) for _ in range(2))
        STREAMS.append(self.stream)
        self.x, self.y = (driver.allocate(16 * ROW) for _ in range(2))
        self.pinned = driver.allocate_host(16 * ROW)
        self.host = np.frombuffer((ctypes.c_char * (16 * ROW)).from_address(self.pinned), np.float32)
        self.context.set_input_shape("x", (2, 4))
        self.context.set_tensor_address("x", self.x)
        self.context.set_tensor_address("y", self.y)

    def refit(self, stream=None):
        self.refitter = trt.Refitter(self.engine, LOG)
        self.weights = trt.OnnxParserRefitter(self.refitter, LOG)
        assert self.weights.refit_from_file(MODEL)
        assert self.refitter.refit_cuda_engine_async(self.stream if stream is None else stream)

    def run(self, stream=None):
        return self.context.execute_async_v3(self.stream if stream is None else stream)

    def up(self, size=16 * ROW):
        driver.upload_later(self.x, self.pinned, size, self.stream)

    def down(self):
        driver.download_later(self.pinned, self.y, 16 * ROW, self.stream)

    def sync(self, stream=None):
        driver.synchronize(self.stream if stream is None else stream)

    def capture(self):
        driver.begin_capture(self.stream)

    def captured(self):
        """Of a run and a copy of its result."""
        self.run()
        self.sync()
        self.capture()
        assert self.run()
        self.down()
        return driver.end_capture(self.stream)


def case(function):
    CASES.append(function)
    return function


driver = Driver()
device = Device(driver)
