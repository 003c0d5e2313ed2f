"""CUDA C++ by NVRTC: it compiles without a GPU, spills nothing, and says what is wrong."""

import ast
import re
import types

import ahead_of_time
import pytest
import torch
from devices import DEVICE
from turbodiffusion_pack.kernels import nvrtc
from turbodiffusion_pack.kernels.int8_linear import hopper as linear
from turbodiffusion_pack.kernels.qk_prepare import hopper as prepare
from turbodiffusion_pack.kernels.sparse_attention import hopper as attention

needs_nvrtc = pytest.mark.skipif(
    nvrtc.unavailable() is not None, reason=f"no NVRTC: {nvrtc.unavailable()}"
)
SHARED_LIMIT = ahead_of_time.SHARED_LIMIT[9, 0]
PREPARED = [
    {"BLOCK": block, "QUANTIZE": quantize, "LINEAR": linear, "BF16": bf16}
    for block, quantize, linear in ((128, 1, 1), (128, 1, 0), (128, 0, 0), (64, 0, 0))
    for bf16 in (0, 1)
]
# Bytes: 8 warps share the registers with those of a second program, which hides more than it costs.
SPILLS = 32


def resources(module, **constants):
    source = module.SOURCE.read_text(encoding="utf-8")
    binary = nvrtc.compile_cuda(source, module.TARGET, **constants)
    return ahead_of_time.resources(binary)


@needs_nvrtc
def test_attention_compiles_and_spills_nothing():
    found = resources(attention)
    assert found["stack"] + found["local"] == 0
    # Its consumers take 240 registers from the pool: this is what every thread starts with.
    assert found["registers"] <= 168


@needs_nvrtc
@pytest.mark.parametrize("constants", PREPARED, ids=str)
def test_prepare_compiles_for_two_programs_on_a_multiprocessor(constants):
    found = resources(prepare, **constants)
    assert found["registers"] <= 128
    assert found["stack"] + found["local"] <= SPILLS


@needs_nvrtc
@pytest.mark.parametrize("bf16", (0, 1))
def test_the_linear_layer_compiles_and_spills_nothing(bf16):
    found = resources(linear, BF16=bf16)
    assert found["stack"] + found["local"] == 0
    assert found["registers"] <= 168  # its consumers take 232


def test_shared_memory_fits():
    assert attention.SHARED_BYTES <= SHARED_LIMIT
    assert linear.SHARED_BYTES <= SHARED_LIMIT
    assert 2 * (prepare.SHARED_BYTES + prepare.LINEAR_BYTES) <= SHARED_LIMIT


@needs_nvrtc
def test_python_and_cuda_agree_on_the_shared_memory():
    """The sizes of all `Shared` structs as the compiler sees them."""
    for module, size in (
        (attention, attention.SHARED_BYTES - 1024),
        (linear, linear.SHARED_BYTES - 1024),
        (prepare, prepare.SHARED_BYTES + prepare.LINEAR_BYTES),
    ):
        source = module.SOURCE.read_text(encoding="utf-8")
        assert_size = f"static_assert(sizeof(Shared) == {size});"
        nvrtc.compile_cuda(source + assert_size, module.TARGET, BF16=1)
        with pytest.raises(RuntimeError, match="static assertion failed"):
            nvrtc.compile_cuda(source + assert_size.replace("==", "!="), module.TARGET, BF16=1)
    dim, block_q, block_k = attention.SHAPE
    sizes = f"HEAD_DIM == {dim} && BLOCK_Q == {block_q} && BLOCK_K == {block_k}"
    threads = f"32 * (CONSUMER_WARPS + 4) == {attention.THREADS}"
    source = attention.SOURCE.read_text(encoding="utf-8")
    nvrtc.compile_cuda(f"{source}static_assert({sizes} && {threads});", attention.TARGET)
    sizes = f"TILE_L == {linear.TILE_L} && TILE_N == {linear.TILE_N}"
    threads = f"32 * (CONSUMER_WARPS + 4) == {linear.THREADS}"
    source = linear.SOURCE.read_text(encoding="utf-8")
    nvrtc.compile_cuda(f"{source}static_assert({sizes} && {threads});", linear.TARGET, BF16=1)


@needs_nvrtc
def test_an_error_names_the_line():
    with pytest.raises(RuntimeError, match=r"for sm_90: kernel\.cu\(2\): error") as caught:
        nvrtc.compile_cuda('extern "C" __global__ void f() {\nwrong;\n}', "sm_90")
    assert "\0" not in str(caught.value)


def test_a_tensor_elsewhere_is_refused():
    kernel = nvrtc.Kernel(driver=None, function=None, shared_bytes=0)
    with pytest.raises(ValueError, match="must be on the GPU, got one on cpu"):
        kernel.launch(1, 32, torch.zeros(1))
    with pytest.raises(ValueError, match="must be on the GPU, got one on cpu"):
        nvrtc.TensorMap(torch.zeros(128, 128, dtype=torch.int8), 128)


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


@pytest.mark.parametrize("module", [attention, linear, prepare], ids=lambda m: m.SOURCE.parent.name)
def test_the_launch_passes_as_many_arguments_as_the_kernel_takes(module):
    source = module.SOURCE.read_text(encoding="utf-8")
    source = re.sub("//.*", "", source)
    (parameters,) = re.findall(r'extern "C" __global__ .*?\(\s*(const.*?)\n\) {', source, re.S)
    tree = ast.parse((module.SOURCE.parent / "hopper.py").read_text(encoding="utf-8"))
    (launch,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "launch"
    )
    starred = {"branch": 3, "x": 3, "cos": 2, "sin": 2, "residual": 2, "out": 2}
    count = 0
    for argument in launch.args[2:]:
        if isinstance(argument, ast.Starred):
            name = next(n.id for n in ast.walk(argument) if isinstance(n, ast.Name))
            count += starred[name]
        else:
            count += 1
    assert count == parameters.count(",") + 1


@pytest.mark.gpu
def test_a_kernel_runs_on_the_current_stream(tmp_path):
    source = tmp_path / "fill.cu"
    source.write_text(
        'extern "C" __global__ void fill(int* x, int value) { x[threadIdx.x] = value + SHIFT; }'
    )
    major, minor = torch.cuda.get_device_capability()
    kernel = nvrtc.load(source, "fill", f"sm_{major}{minor}", 0, 0, SHIFT=2)
    x = torch.zeros(32, dtype=torch.int32, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        # Started elsewhere it would be through before the 1s arrive.
        torch.cuda._sleep(50_000_000)
        x.fill_(1)
        kernel.launch(1, 32, x, 5)
    torch.cuda.synchronize()
    assert x.tolist() == [7] * 32
