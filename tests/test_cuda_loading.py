"""Loading a CUDA kernel in a thread that has no context yet, with a driver that records what it is asked."""
import threading
from contextlib import nullcontext

import pytest
import torch

from mamba2d.scan import cuda, nvrtc

needs_context = ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute")
own_context = 99  # a context that a thread has made current itself


class RecordingDriver:
    "A driver with two devices; their primary contexts are number 1 and 2. Each thread has a current context."

    def __init__(self):
        self.calls = []  # (thread, function, context that was current)
        self.local = threading.local()

    @property
    def context(self):
        return getattr(self.local, "context", None)

    def record(self, function):
        self.calls.append((threading.get_ident(), function, self.context))

    def cuCtxGetCurrent(self, out):  # noqa: N802  the driver's name
        self.record("cuCtxGetCurrent")
        out._obj.value = self.context
        return 0

    def cuCtxSetCurrent(self, context):  # noqa: N802  the driver's name
        self.record("cuCtxSetCurrent")
        self.local.context = context.value
        return 0

    def cuDeviceGet(self, out, index):  # noqa: N802  the driver's name
        self.record("cuDeviceGet")
        out._obj.value = index
        return 0

    def cuDevicePrimaryCtxRetain(self, out, device):  # noqa: N802  the driver's name
        self.record("cuDevicePrimaryCtxRetain")
        out._obj.value = device.value + 1
        return 0

    def cuLaunchKernel(self, *call):  # noqa: N802  the driver's name
        self.record("cuLaunchKernel")
        return 0 if self.context else 201

    def __getattr__(self, name):
        "Functions that load a kernel: they fail as the driver does where no context is current."
        if name not in needs_context:
            raise AttributeError(name)

        def call(*arguments):
            self.record(name)
            return 0 if self.context else 201

        return call


@pytest.fixture
def driver(monkeypatch):
    driver = RecordingDriver()
    nvrtc._primary_context.cache_clear()
    for module in (nvrtc, cuda):
        monkeypatch.setattr(module, "cuda_driver", lambda: driver)
    monkeypatch.setattr(cuda, "_card", lambda index: (90, 232448, 132))
    monkeypatch.setattr(cuda, "compile_cuda", lambda *given: b"code")
    monkeypatch.setattr(cuda, "_loaded", {})
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    yield driver
    nvrtc._primary_context.cache_clear()


def in_thread(function):
    "Run a function in a new thread; what it raises is raised here."
    raised = []

    def run():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def load(device=0, name="scan_backward"):
    return cuda._load_kernel(device, "scan_bwd.cu", name, dict(BLOCKS=1), 100_000)


def functions(driver):
    return [function for _, function, _ in driver.calls]


def test_a_thread_without_context_gets_one(driver):
    in_thread(load)
    assert all(context == 1 for _, function, context in driver.calls if function in needs_context)
    assert set(needs_context) < set(functions(driver))
    first = ["cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"]
    assert functions(driver)[:4] == first


def test_a_loaded_kernel_is_found_by_another_thread(driver):
    in_thread(load)
    in_thread(load)
    assert all(context == 1 for _, function, context in driver.calls if function in needs_context)
    assert functions(driver).count("cuModuleLoadData") == 1
    assert functions(driver).count("cuDevicePrimaryCtxRetain") == 1


def test_a_thread_with_a_context_is_left_alone(driver):
    def load_in_own_context():
        driver.local.context = own_context
        load()

    in_thread(load_in_own_context)
    assert all(context == own_context for _, _, context in driver.calls)
    assert "cuCtxSetCurrent" not in functions(driver) and "cuDevicePrimaryCtxRetain" not in functions(driver)


def test_each_device_has_its_context(driver):
    in_thread(lambda: load(0))
    in_thread(lambda: load(1))
    assert {context for _, function, context in driver.calls if function in needs_context} == {1, 2}


def test_a_launch_without_context_is_tried_again(driver):
    kernels = []
    in_thread(lambda: kernels.append(load()))
    driver.calls.clear()
    in_thread(lambda: kernels[0](1, 32, 0, 0, b"arguments"))
    assert functions(driver) == ["cuLaunchKernel", "cuCtxSetCurrent", "cuLaunchKernel"]


def test_a_kernel_asks_for_its_shared_memory(driver):
    "Also below 48 KiB, which the driver gives, since these hold what the kernel declares itself as well."
    asked = []
    driver.cuFuncSetAttribute = lambda function, attribute, value: asked.append((attribute, value)) and 0
    for shared in (1024, 49088, 100000):
        nvrtc.make_context_current(0)
        cuda._load_kernel(0, "scan_fwd.cu", "scan_forward", {"BLOCKS": 1, "SHARED": shared}, shared)
    assert [value for attribute, value in asked if attribute == 8] == [1024, 49088, 100000]
