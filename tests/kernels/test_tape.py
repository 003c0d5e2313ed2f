"""What a function launched is recorded and run again on other tensors; a driver here plays it."""

import ctypes
import functools
import importlib
import inspect
import types
import weakref
from pathlib import Path

import pytest
import torch
from turbodiffusion_pack import kernels
from turbodiffusion_pack.kernels import dispatch, driver, launching, nvrtc, tape

Operands = nvrtc.operands(pointers="x y", integers="count times")
OperandsAndMap = nvrtc.operands(pointers="x y", integers="count times", maps="map")
CPU = -1  # the number of its device


@pytest.fixture(autouse=True)
def poison_fresh_memory():
    """Not here: to write to what was allocated is no operation of the function's."""


def run_kernel(memory: int, has_map: bool) -> None:
    """y = times * x, and what lies first where the map says."""
    given = (OperandsAndMap if has_map else Operands).from_address(memory)
    x, y = ((ctypes.c_float * given.count).from_address(place) for place in (given.x, given.y))
    more = ctypes.c_float.from_address(given.map[0]).value if has_map else 0.0
    y[:] = [given.times * value + more for value in x]


def encode(room, kind, rank, pointer, *_) -> int:
    room[:] = (pointer.value, *range(15))
    return 0


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> list:
    """The driver's launches; it runs them at once."""
    found = []

    def launch(function, x, y, z, threads, _, __, shared, stream, parameters, ___):
        found.append((function.value, (x, y, z), threads, shared))
        run_kernel(parameters[0], function.value == WITH_MAP.function.value)
        return 0

    library = types.SimpleNamespace(cuLaunchKernel=launch, cuTensorMapEncodeTiled=encode)
    for module in (driver, nvrtc):
        monkeypatch.setattr(module, "driver", lambda: library)
    monkeypatch.setattr(driver, "_current_device", lambda: CPU)
    monkeypatch.setattr(driver, "_stream_on", lambda device: 0)
    monkeypatch.setattr(nvrtc, "address", lambda x: 0 if x is None else x.data_ptr())
    return found


KERNEL, WITH_MAP = (nvrtc.Kernel(ctypes.c_void_p(n), 16, CPU) for n in (7, 8))


def scaled(x, times: int, mapped=None, out=None):
    y = torch.empty(x.shape) if out is None else out
    numbers = x.data_ptr(), y.data_ptr(), x.numel(), times
    if mapped is None:
        KERNEL.launch(5, 64, Operands(*numbers))
    else:
        WITH_MAP.launch(5, 64, OperandsAndMap(nvrtc.tensor_map(mapped, (8, 32)), *numbers))
    return y


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def recorded(function, *inputs) -> tape.Tape:
    with tape.recording(inputs) as recorder:
        out = function(*inputs)
    return recorder.tape(out)


def compute(x, weight):
    """With views of what was given and of what was made, of which some is freed on the way."""
    a = scaled(x, 3)
    a = scaled(a[1:], 2)
    total = a.sum(0) * 0.5
    b = scaled(total, -1)
    b = scaled(x[2], 5) + b
    return scaled(weight, 1)[:2].add(b)


def test_it_gives_what_the_function_gives_of_other_inputs(launches):
    made = recorded(compute, rows(0, 4, 16), rows(1, 3, 16))
    launches.clear()
    for seed in (2, 3, 2):
        inputs = rows(seed, 4, 16), rows(seed + 9, 3, 16)
        expected = compute(*inputs)
        straight = launches.copy()
        launches.clear()
        assert torch.equal(made.run(inputs), expected)
        assert launches == straight
        launches.clear()


def test_the_driver_reads_each_launch_as_it_was():
    made = recorded(lambda x: scaled(scaled(x, 3), -2), rows(0, 16))
    assert [step[1][:-3] for step in made.steps if step[0] == tape.LAUNCH] == [
        (KERNEL.function, 5, 1, 1, 64, 1, 1, 16)
    ] * 2


def test_tensor_maps_follow_their_tensors():
    def function(x, floats):
        made = scaled(x, 3)
        return scaled(x, 2, floats[1:].view(torch.int16)) + scaled(x, 1, made.view(torch.int16))

    made = recorded(function, rows(0, 2, 16), rows(1, 3, 16))
    for seed in (2, 3):
        inputs = rows(seed, 2, 16), rows(seed + 9, 3, 16)
        assert torch.equal(made.run(inputs), function(*inputs))


def test_a_map_that_the_driver_refuses_leaves_no_address_behind(monkeypatch):
    made = recorded(lambda x: scaled(x, 2, x.view(torch.int16)), rows(0, 2, 16))
    x, y = rows(1, 2, 16), rows(2, 2, 16)
    expected = made.run((x,))
    with monkeypatch.context() as patched:
        patched.setattr(nvrtc, "map_of", refuse)
        with pytest.raises(RuntimeError, match="refused"):
            made.run((y,))
    assert torch.equal(made.run((x,)), expected)


def refuse(*_):
    raise RuntimeError("refused")


def test_a_map_from_elsewhere_is_not_recorded():
    x = rows(0, 2, 16)
    known = nvrtc.tensor_map(x.view(torch.int16), (8, 32))

    def function(x):
        y = torch.empty(x.shape)
        WITH_MAP.launch(5, 64, OperandsAndMap(known, x.data_ptr(), y.data_ptr(), x.numel(), 1))
        return y

    with pytest.raises(tape.UnrecordedError, match="that nobody told of"):
        recorded(function, x)


def largest(monkeypatch, run) -> tuple[int, int]:
    """The most bytes of torch.empty that are alive at once while `run()` runs, and its calls."""
    alive, most, calls, empty = 0, 0, 0, torch.empty

    def gone(size):
        nonlocal alive
        alive -= size

    def counted(*args, **kwargs):
        nonlocal alive, most, calls
        x = empty(*args, **kwargs)
        alive, calls = alive + x.nbytes, calls + 1
        most = max(most, alive)
        weakref.finalize(x, gone, x.nbytes)
        return x

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", counted)
        run()
    return most, calls


def one_of_another(x):
    for times in range(1, 6):
        x = scaled(x, times)
    return x


def all_into_one(x):
    y = torch.empty(x.shape)
    for times in range(1, 5):
        scaled(scaled(x, times), 2, out=y)
    return y


@pytest.mark.parametrize("function", [one_of_another, all_into_one])
def test_it_takes_no_more_memory(function, monkeypatch):
    x = rows(0, 1000)
    monkeypatch.setattr(tape, "SMALL", 0)
    made = recorded(function, x)
    # Never more than two of 4000 bytes.
    assert largest(monkeypatch, functools.partial(function, x)) == (8000, 5)
    assert largest(monkeypatch, functools.partial(made.run, (x,))) == (8000, 5)


def test_small_rooms_come_together(monkeypatch):
    def function(x):
        a, b = scaled(x, 1), scaled(x, 2)
        return scaled(scaled(scaled(a + b, 2), 3), 4)

    x = rows(0, 1000)
    expected = function(x)
    # Not what torch adds, nor what the function gives.
    for together, calls in ((tape.TOGETHER, 4), (4096, 5)):
        monkeypatch.setattr(tape, "TOGETHER", together)
        made = recorded(function, x)
        assert largest(monkeypatch, functools.partial(made.run, (x,)))[1] == calls
        assert torch.equal(made.run((x,)), expected)


@tape.constant
def table(device):
    return torch.full((16,), 7.0, device=device)


def test_a_constant_is_read_where_it_lies():
    known = table(torch.device("cpu"))
    made = recorded(lambda x: scaled(x, 1) + scaled(known, 1), torch.zeros(16))
    assert torch.equal(made.run((torch.ones(16),)), torch.full((16,), 8.0))


STRAY = rows(5, 16)


def kept_reference(x):
    dispatch.choose("some_op", "reference", x, None, None)
    return scaled(x, 1)


def by_triton(x):
    launching.launched(Triton())[1,](x)
    return scaled(x, 1)


class Triton:
    arg_names = ("x_ptr",)

    def __getitem__(self, grid):
        return lambda *_, **__: None


def on_another_card(x):
    y = scaled(x, 1)
    other = nvrtc.Kernel(ctypes.c_void_p(7), 0, 3)
    driver._current_device = lambda: 3
    other.launch(1, 32, Operands(x.data_ptr(), y.data_ptr(), 16, 1))
    return y


NOT_RECORDED = {
    "writes to what it was given": (lambda x: scaled(x.add_(1.0), 1), "gives no tensor of its own"),
    "reads what the CPU has to know": (lambda x: scaled(x, int(x[0])), "gives no tensor of its"),
    "takes a tensor from elsewhere": (lambda x: scaled(STRAY, 1), "neither given nor made"),
    "takes one in torch": (lambda x: scaled(x + STRAY, 1), "neither given nor made"),
    "gives what it was given": (lambda x: x[1:], "what it was given"),
    "takes a list": (lambda x: scaled(torch.cat([x, x]), 1), "in a list"),
    "runs a reference": (kept_reference, "some_op runs in torch reference"),
    "compiles": (by_triton, "Triton launches a kernel for the first time"),
    "runs on another card": (on_another_card, "on another device"),
    "gives two tensors": (lambda x: scaled(torch.sort(x)[0], 1), "gives a"),
}


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_it_is_not_recorded_where_it(name):
    function, why = NOT_RECORDED[name]
    with pytest.raises(tape.UnrecordedError, match=why):
        recorded(function, rows(0, 16))


def test_inputs_that_share_memory_are_not_told_apart():
    x = rows(0, 32)
    with pytest.raises(tape.UnrecordedError, match="share memory"):
        recorded(lambda a, b: scaled(a, 1), x[:20], x[16:])
    recorded(lambda a, b: scaled(a, 1), x[:16], x[16:])


@pytest.mark.parametrize("op", sorted(tape.TRITONS_OWN))
def test_what_triton_launches_by_itself_is_not_recorded(op):
    recorder = tape.Recorder((rows(0, 16),))
    recorder.hear(op, dispatch.CUDA, None)
    assert recorder.why is None
    recorder.hear(op, dispatch.TRITON, None)
    assert recorder.why == f"{op} runs in Triton"


def test_all_other_kernels_are_seen():
    unseen = set()
    for file in Path(kernels.__file__).parent.glob("*/triton.py"):
        module = importlib.import_module(f"{kernels.__name__}.{file.parent.name}.triton")
        for name, kernel in vars(module).items():
            own = inspect.getmodule(getattr(kernel, "fn", None)) is module
            if own and name.endswith("_kernel") and not isinstance(kernel, launching.Launched):
                unseen.add(name)
    assert unseen == {"linear_kernel", "sparse_attention_kernel", "sage_attention_kernel"}


def test_whoever_listens_hears_of_the_ops_each_time():
    def function(x):
        dispatch.choose("some_op", "auto", x, "reference", "triton")
        return scaled(x, 1)

    def heard_of(run) -> list:
        heard = []
        with dispatch.listening(lambda *told: heard.append(told)):
            run()
        return heard

    x, made = rows(0, 16), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dispatch, "why_reference", lambda *_: None)
        first = heard_of(lambda: made.append(recorded(function, x)))
    assert first == [("some_op", dispatch.TRITON, None)]
    assert heard_of(lambda: made[0].run((x,))) == first


def test_one_thread_at_a_time():
    x = rows(0, 16)
    made = recorded(lambda x: scaled(x, 2), x)
    with made.lock:
        assert made.run((x,)) is None
    assert made.run((x,)) is not None


def test_what_the_driver_refuses_is_raised(monkeypatch):
    x = rows(0, 16)
    made = recorded(lambda x: scaled(x, 2), x)

    def describe(code, text):
        text._obj.value = b"out of resources"

    library = types.SimpleNamespace(cuLaunchKernel=lambda *_: 7, cuGetErrorString=describe)
    monkeypatch.setattr(driver, "driver", lambda: library)
    with pytest.raises(RuntimeError, match="the CUDA driver failed: out of resources"):
        made.run((x,))
    assert not made.lock.locked()
