"""CUDA C++ by NVRTC: it compiles without a GPU, spills nothing, and says what is wrong."""

import ctypes
import types
from pathlib import Path
from typing import NamedTuple

import ahead_of_time
import older_cards
import pytest
import torch
from devices import DEVICE
from turbodiffusion_pack.kernels import nvrtc
from turbodiffusion_pack.kernels.int8_linear import hopper as linear
from turbodiffusion_pack.kernels.int8_linear import int8_linear
from turbodiffusion_pack.kernels.linear_attention import LinearBranch
from turbodiffusion_pack.kernels.qk_prepare import hopper as prepare
from turbodiffusion_pack.kernels.qk_prepare import prepare as prepare_op
from turbodiffusion_pack.kernels.sparse_attention import hopper as attention
from turbodiffusion_pack.kernels.sparse_attention import sage_attention

needs_nvrtc = pytest.mark.skipif(
    nvrtc.unavailable() is not None, reason=f"no NVRTC: {nvrtc.unavailable()}"
)
SHARED_LIMIT = ahead_of_time.SHARED_LIMIT[9, 0]
MODULES = {"sage_attention": attention, "int8_linear": linear, "prepare": prepare}
# Registers a thread starts with. Attention's and the linear layer's multiplying warps then take
# more from their program's pool; two programs of prepare share a multiprocessor.
REGISTERS = {"sage_attention": 168, "int8_linear": 168, "prepare": 128}
# Bytes: 8 warps share the registers with those of a second program, which hides more than it costs.
SPILLS = {"sage_attention": 0, "int8_linear": 0, "prepare": 32}


class Launch(NamedTuple):
    """One launch of the host code: what it loaded, and what it passed to the kernel."""

    source: Path
    name: str
    target: str
    shared_bytes: int
    constants: tuple[tuple[str, int], ...]
    threads: int
    operands: ctypes.Structure

    @property
    def built(self) -> tuple:
        """All that decides on the machine code."""
        return self.source, self.target, self.shared_bytes, type(self.operands), self.constants


@pytest.fixture
def launches(monkeypatch):
    """The launches that a Hopper would get from here on; nothing is compiled or runs."""
    older_cards.pretend(monkeypatch, older_cards.HOPPER)
    found = []

    def load(source, name, target, shared_bytes, operands, device, **constants):
        def launch(programs, threads, given):
            assert type(given) is operands
            flags = tuple(constants.items())
            found.append(Launch(source, name, target, shared_bytes, flags, threads, given))

        return types.SimpleNamespace(launch=launch)

    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(nvrtc, "load", load)
    monkeypatch.setattr(nvrtc, "address", lambda x: 0 if x is None else x.data_ptr())
    monkeypatch.setattr(nvrtc, "tensor_map", lambda x, box: nvrtc.TENSOR_MAP(x.data_ptr(), box))
    return found


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def launch_prepare(dtype, block=128, **options):
    x, angles = zeros(1, 70, 1, 128, dtype=dtype), zeros(1, 70, 64)
    prepare_op(x, zeros(128), angles, angles, block=block, backend="triton", **options)


def launch_linear(dtype, **options):
    x, w = zeros(1, 70, 128, dtype=torch.int8), zeros(128, 128, dtype=torch.int8)
    int8_linear(x, zeros(1, 70), w, zeros(128), out_dtype=dtype, backend="triton", **options)


def launch_attention(dtype):
    heads = zeros(1, 70, 1, 128, dtype=dtype)
    chosen = zeros(1, 1, 1, 2, dtype=torch.int32)
    sage_attention(heads, heads, heads, chosen, "fp8", backend="triton")


def launch_all():
    """In both dtypes and with every constant that the host code may choose."""
    branch = LinearBranch(zeros(1, 1, 128, 128), zeros(1, 1, 128), zeros(128, 128), zeros(128))
    for dtype in (torch.bfloat16, torch.float16):
        launch_prepare(dtype, quantize=True, branch=branch)
        launch_prepare(dtype, quantize=True)
        launch_prepare(dtype)
        launch_prepare(dtype, block=64)
        launch_linear(dtype)
        launch_attention(dtype)


@needs_nvrtc
def test_what_is_launched_compiles_and_spills_nothing(launches):
    """So the sizes that .cu files assert are those that launches pass."""
    launch_all()
    assert {launch.name for launch in launches} == set(MODULES)
    for launch in {launch.built: launch for launch in launches}.values():
        *built, constants = launch.built
        binary = nvrtc.compile_file(*built, **dict(constants))
        used = ahead_of_time.resources(binary)
        assert used["registers"] <= REGISTERS[launch.name], launch
        assert used["stack"] + used["local"] <= SPILLS[launch.name], launch


@needs_nvrtc
@pytest.mark.parametrize("size", ["shared_bytes", "operands"])
def test_a_size_that_differs_does_not_compile(size):
    sizes = {"shared_bytes": linear.SHARED_BYTES, "operands": linear.Operands}
    sizes[size] = {"shared_bytes": linear.SHARED_BYTES - 16, "operands": attention.Operands}[size]
    with pytest.raises(RuntimeError, match="static assertion failed"):
        nvrtc.compile_file(linear.SOURCE, linear.TARGET, **sizes, BF16=1)


@needs_nvrtc
def test_python_and_cuda_agree_on_operands_and_sizes(launches, tmp_path):
    """Every field of an `Operands` lies where the compiler sees it, and tiles are as large."""
    launch_all()
    head_dim, block_q, block_k = attention.SHAPE
    sizes = {
        "sage_attention": {"HEAD_DIM": head_dim, "BLOCK_Q": block_q, "BLOCK_K": block_k},
        "int8_linear": {"TILE_L": linear.TILE_L, "TILE_N": linear.TILE_N},
        "prepare": {"HEAD_DIM": prepare.HEAD_DIM, "ROWS": prepare.ROWS},
    }
    for launch in {launch.name: launch for launch in launches}.values():
        source, *built, constants = launch.built
        operands = type(launch.operands)
        facts = [f"{name} == {size}" for name, size in sizes[launch.name].items()]
        facts.append(f"THREADS == {launch.threads}")
        for name, _ in operands._fields_:
            if name != "end":
                offset = getattr(operands, name).offset
                # `offsetof`, for which NVRTC has no header.
                facts.append(f"__INTADDR__(&((Operands*)0)->{name}) == {offset}")
        checked = tmp_path / "checked.cu"
        checks = "".join(f"static_assert({fact});\n" for fact in facts)
        checked.write_text(source.read_text(encoding="utf-8") + checks, encoding="utf-8")
        nvrtc.compile_file(checked, *built, **dict(constants))


def test_operands_say_what_was_given(launches):
    x, w = zeros(1, 70, 128, dtype=torch.int8), zeros(256, 128, dtype=torch.int8)
    residual, gate = zeros(1, 70, 256, dtype=torch.bfloat16), zeros(1, 1, 256)
    out = int8_linear(
        x, zeros(1, 70), w, zeros(256), gate=gate, residual=residual, backend="triton"
    )
    (launch,) = launches
    found = launch.operands
    assert list(found.x_map[:2]) == [x.data_ptr(), linear.TILE_L]
    assert list(found.w_map[:2]) == [w.data_ptr(), linear.TILE_N]
    assert found.bias is None
    pointers = found.gate, found.residual, found.out
    assert pointers == tuple(t.data_ptr() for t in (gate, residual, out))
    assert (found.batch, found.length, found.n, found.k) == (1, 70, 256, 128)
    assert (found.gate_b, found.residual_l, found.out_l) == (256, 256, 256)


def test_shared_memory_fits():
    assert attention.SHARED_BYTES <= SHARED_LIMIT
    assert linear.SHARED_BYTES <= SHARED_LIMIT
    assert 2 * (prepare.SHARED_BYTES + prepare.LINEAR_BYTES) <= SHARED_LIMIT


@needs_nvrtc
def test_an_error_names_the_line():
    with pytest.raises(RuntimeError, match=r"for sm_90: kernel\.cu\(2\): error") as caught:
        nvrtc.compile_cuda('extern "C" __global__ void f() {\nwrong;\n}', "sm_90")
    assert "\0" not in str(caught.value)


def test_a_tensor_elsewhere_is_refused():
    with pytest.raises(ValueError, match="must be on the GPU, got one on cpu"):
        nvrtc.address(torch.zeros(1))
    with pytest.raises(ValueError, match="must be on the GPU, got one on cpu"):
        nvrtc.tensor_map(torch.zeros(128, 128, dtype=torch.int8), 128)
    assert nvrtc.address(None) == 0


def test_a_tensor_map_is_made_once_for_each_place_and_shape(monkeypatch):
    made = []

    def encode(result, *what):
        made.append(what)
        result[0] = len(made)
        return 0

    driver = types.SimpleNamespace(cuTensorMapEncodeTiled=encode)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "address", torch.Tensor.data_ptr)
    nvrtc._encoded.cache_clear()
    x = torch.zeros(3, 256, 256, dtype=torch.int8)
    others = x[1:], x[:, :128], x[..., :128], x[:, ::2], x[0]
    maps = [nvrtc.tensor_map(x, 128)[0], *(nvrtc.tensor_map(other, 128)[0] for other in others)]
    assert maps == [1, 2, 3, 4, 5, 6]
    assert nvrtc.tensor_map(x, 64)[0] == 7
    assert nvrtc.tensor_map(x.clone(), 128)[0] == 8
    assert nvrtc.tensor_map(x, 128)[0] == 1
    nvrtc._encoded.cache_clear()


@needs_nvrtc
def test_constants_are_defined():
    source = 'static_assert(SIZE == 7); extern "C" __global__ void f() {}'
    assert nvrtc.compile_cuda(source, "sm_90", SIZE=7)


def test_the_places_of_a_product_are_a_permutation():
    places = prepare.places(torch.device("cpu"))
    assert sorted(places.tolist()) == list(range(prepare.HEAD_DIM))


def test_a_torch_without_cuda_says_so(monkeypatch):
    without_cuda = types.SimpleNamespace(version=types.SimpleNamespace(cuda=None))
    monkeypatch.setattr(nvrtc, "torch", without_cuda)
    assert nvrtc.unavailable.__wrapped__() == "torch was built without CUDA"


@pytest.mark.gpu
def test_a_kernel_runs_on_the_current_stream(tmp_path):
    source = tmp_path / "fill.cu"
    source.write_text("""
        struct Operands { int* x; int value; };
        static_assert(OPERANDS_BYTES == sizeof(Operands) && SHARED_BYTES == 0);
        extern "C" __global__ void fill(const __grid_constant__ Operands o) {
            o.x[threadIdx.x] = o.value + SHIFT;
        }
    """)
    major, minor = torch.cuda.get_device_capability()
    fill = nvrtc.operands(pointers="x", integers="value")
    kernel = nvrtc.load(source, "fill", f"sm_{major}{minor}", 0, fill, 0, SHIFT=2)
    x = torch.zeros(32, dtype=torch.int32, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        # Started elsewhere it would be through before the 1s arrive.
        torch.cuda._sleep(50_000_000)
        x.fill_(1)
        kernel.launch(1, 32, fill(nvrtc.address(x), 5))
    torch.cuda.synchronize()
    assert x.tolist() == [7] * 32
