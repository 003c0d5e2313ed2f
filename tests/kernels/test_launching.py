"""A Triton kernel's arguments are packed once a shape, and launched with fresh addresses."""

import contextlib
import ctypes
import threading
import types

import pytest
import torch
import triton
import triton.language as tl
from devices import DEVICE
from turbodiffusion_pack.kernels import driver, launching

NAMES = ["x_ptr", "weight_ptr", "y_ptr", "length", "eps", "stride_x", "GAUSS", "BLOCK"]
SIGNATURE = dict.fromkeys(NAMES, "constexpr") | {
    "x_ptr": "*bf16", "y_ptr": "*fp32", "length": "i32", "eps": "fp32", "stride_x": "i64",
}  # fmt: skip
PARAMETERS = "u64", "u64", "u32", "f32", "u64", "u64", "u64"
NUMBERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
NUMBERS |= dict.fromkeys(("*bf16", "*fp32", "*"), ctypes.c_uint64)


def compiled(**changed) -> types.SimpleNamespace:
    """What Triton gives for a kernel of SIGNATURE, as far as a launch looks at it."""
    made = {
        "num_warps": 4, "num_ctas": 1, "shared": 512, "launch_cooperative_grid": False,
        "launch_pdl": False, "global_scratch_size": 0, "profile_scratch_size": 0,
    }  # fmt: skip
    signature = changed.pop("signature", SIGNATURE)
    parameters = changed.pop("parameters", PARAMETERS)
    return types.SimpleNamespace(
        function=77,
        metadata=types.SimpleNamespace(**made | changed),
        src=types.SimpleNamespace(signature=signature),
        asm={"ptx": f".entry f({''.join(f'.param .{p} p, ' for p in parameters)}) .param .u8"},
    )


class Kernel:
    """Triton's face of a kernel; notes each of its launches."""

    arg_names = NAMES

    def __init__(self, result):
        self.result, self.launches = result, []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launches.append((grid, *arguments, *constants.values()))
            return self.result

        return launch


@pytest.fixture
def started(monkeypatch) -> list[dict]:
    """The launches that went past Triton: how, and the arguments as the driver reads them."""
    found = []

    def start(function, grid, threads, shared_bytes, device, parameters):
        kinds = [kind for kind in SIGNATURE.values() if kind != "constexpr"] + ["*", "*"]
        pairs = zip(kinds, parameters, strict=True)
        values = [NUMBERS[kind].from_address(place).value for kind, place in pairs]
        found.append({"how": (function.value, grid, threads, shared_bytes, device), "with": values})

    monkeypatch.setattr(launching, "start", start)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda x: getattr(x, "card", 0))
    return found


def rows(length: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.zeros(length, 64, dtype=dtype)


def launch(kernel, x, y, weight=None, eps=0.5, length=-3, stride=2**33, block=64) -> None:
    kernel[5, 2](x, weight, y, length, eps, stride, True, BLOCK=block)


def test_the_second_launch_passes_the_same_with_other_addresses(started):
    plain = Kernel(compiled())
    kernel = launching.launched(plain)
    x, y, other = rows(3), rows(3, torch.float32), rows(3)
    launch(kernel, x, y)
    assert plain.launches == [((5, 2), x, None, y, -3, 0.5, 2**33, True, 64)]
    assert started == []
    launch(kernel, x, y)
    launch(kernel, other, y)
    assert len(plain.launches) == 1
    assert [s["how"] for s in started] == [(77, (5, 2, 1), 128, 512, 0)] * 2
    scratch = 0, 0
    assert [s["with"] for s in started] == [
        [place.data_ptr(), y.data_ptr(), -3, 0.5, 2**33, *scratch] for place in (x, other)
    ]


def other_cards(x):
    x.card = 1
    return x


CHANGES = {
    "another dtype": {"x": rows(3, torch.float16)},
    "another number": {"length": 4},
    "another stride": {"stride": 1},
    "another constant": {"block": 32},
    "a tensor more": {"weight": rows(1)},
    "an address that is no multiple of 16": {"x": rows(3).view(-1)[1:]},
    "another card": {"x": other_cards(rows(3)), "y": other_cards(rows(3, torch.float32))},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_triton_launches_what_it_has_not_compiled(started, change):
    plain = Kernel(compiled())
    kernel = launching.launched(plain)
    same = {"x": rows(3), "y": rows(3, torch.float32)}
    launch(kernel, **same)
    launch(kernel, **same | change)
    assert len(plain.launches) == 2
    assert started == []


ONLY_TRITON = {
    "the interpreter": None,
    "clusters": compiled(num_ctas=2),
    "a cooperative grid": compiled(launch_cooperative_grid=True),
    "dependent launches": compiled(launch_pdl=True),
    "memory to work in": compiled(global_scratch_size=8),
    "memory for a profile": compiled(profile_scratch_size=8),
    "oversized shared memory": compiled(shared=228 * 1024),
    "a tensor map": compiled(signature=SIGNATURE | {"x_ptr": "tensordesc<bf16[64,64]>"}),
    "half a number": compiled(signature=SIGNATURE | {"eps": "fp16"}),
    "an argument more": compiled(parameters=(*PARAMETERS, "u64")),
    "an argument less": compiled(parameters=PARAMETERS[:-1]),
    "its arguments in another order": compiled(parameters=(*PARAMETERS[1:], "u64")),
}


@pytest.mark.parametrize("result", ONLY_TRITON.values(), ids=ONLY_TRITON)
def test_only_triton_launches_a_kernel_with(started, result):
    plain = Kernel(result)
    kernel = launching.launched(plain)
    for _ in range(2):
        launch(kernel, rows(3), rows(3, torch.float32))
    assert len(plain.launches) == 2
    assert started == []


@pytest.mark.parametrize("cards", [(-1, -1), (0, -1), (0, 1)], ids="{0[0]} and {0[1]}".format)
def test_tensors_that_are_not_on_one_gpu_are_left_to_triton(started, cards):
    plain = Kernel(compiled())
    kernel = launching.launched(plain)
    x, y = rows(3), rows(3, torch.float32)
    x.card, y.card = cards
    for _ in range(2):
        launch(kernel, x, y)
    assert len(plain.launches) == 2
    assert started == []


def test_torch_compile_sees_tritons_kernel(started, monkeypatch):
    plain = Kernel(compiled())
    kernel = launching.launched(plain)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for _ in range(2):
        launch(kernel, rows(3), rows(3, torch.float32))
    assert len(plain.launches) == 2


def test_threads_do_not_share_what_they_pack_into(started, monkeypatch):
    kernel = launching.launched(Kernel(compiled()))
    x, y, other = rows(3), rows(3, torch.float32), rows(3)
    for _ in range(2):
        launch(kernel, x, y)
    started.clear()
    start, inner = launching.start, []

    def start_in_the_middle(*arguments):
        """As where another thread launches the same kernel before the driver has read this one."""
        if not inner:
            inner.append(threading.Thread(target=launch, args=(kernel, other, y)))
            inner[0].start()
            inner[0].join()
        start(*arguments)

    monkeypatch.setattr(launching, "start", start_in_the_middle)
    launch(kernel, x, y)
    assert [s["with"][0] for s in started] == [other.data_ptr(), x.data_ptr()]


@pytest.mark.parametrize(
    ("code", "name", "kind"),
    [
        (98, "invalid device function", RuntimeError),
        (2, "out of memory", torch.OutOfMemoryError),  # which ComfyUI makes room for
    ],
)
def test_what_the_driver_refuses_is_raised(monkeypatch, code, name, kind):
    def describe(code, text):
        text._obj.value = name.encode()

    fake = types.SimpleNamespace(cuLaunchKernel=lambda *_: code, cuGetErrorString=describe)
    monkeypatch.setattr(driver, "driver", lambda: fake)
    monkeypatch.setattr(driver, "_current_device", lambda: 0)
    monkeypatch.setattr(driver, "_stream_on", lambda device: 0)
    with pytest.raises(RuntimeError, match=f"the CUDA driver failed: {name}") as refused:
        driver.start(ctypes.c_void_p(1), (1, 1, 1), 32, 0, 0, (ctypes.c_void_p * 1)())
    assert refused.type is kind


@pytest.mark.parametrize(
    ("errors", "kind"),
    [
        (["Triton Error [CUDA]: out of memory"], None),
        (2 * ["Triton Error [CUDA]: out of memory"], torch.OutOfMemoryError),
        (["Triton Error [CUDA]: invalid argument"], RuntimeError),
    ],
)
def test_a_first_launch_without_memory_is_done_again(started, monkeypatch, errors, kind):
    plain, cached, left = Kernel(compiled()), [True], list(errors)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", cached.clear)

    class Full(Kernel):
        def __getitem__(self, grid):
            if left:
                raise RuntimeError(left.pop())
            return plain[grid]

    with pytest.raises(kind) if kind else contextlib.nullcontext() as refused:
        launch(launching.launched(Full(None)), rows(3), rows(3, torch.float32))
    assert kind is None or refused.type is kind
    assert len(plain.launches) == int(kind is None)
    assert cached == ([True] if kind is RuntimeError else [])


@launching.launched
@triton.jit(do_not_specialize=["length"])
def scale_kernel(x_ptr, y_ptr, length, factor, stride_x, stride_y, BLOCK: tl.constexpr):  # noqa: N803
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index * stride_x, mask=index < length, other=0.0)
    tl.store(y_ptr + index * stride_y, x * factor, mask=index < length)


def scaled(x: torch.Tensor, factor: float, block: int = 128) -> torch.Tensor:
    y = torch.full((len(x),), -1.0, device=x.device)
    programs = -(-len(x) // block)
    scale_kernel[(programs,)](x, y, len(x), factor, x.stride(0), y.stride(0), BLOCK=block)
    return y


def test_a_launched_kernel_computes():
    x = torch.arange(1000.0, device=DEVICE)
    for part in (x, x, x[::3], x[1:], x[:1]):
        for factor in (0.5, 2.0, 2.0):
            assert torch.equal(scaled(part, factor), part * factor)


@pytest.mark.gpu
def test_a_gpu_runs_what_was_packed():
    scale_kernel.ready.clear()
    x, other = (torch.randn(1000, device="cuda") for _ in range(2))
    scaled(x, 3.0)
    assert len(scale_kernel.ready) == 1
    assert torch.equal(scaled(other, 3.0), other * 3.0)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10_000_000)
        late = torch.full_like(other, 7.0)
        y = scaled(late, 3.0)  # after what is before it on this stream
        torch.cuda.current_stream().synchronize()
    assert torch.equal(y, late * 3.0)
    assert len(scale_kernel.ready) == 1
