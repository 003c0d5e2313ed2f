"""CUDA C++ by NVRTC: it compiles without a GPU, spills nothing, and says what is wrong."""

import contextlib
import re
import types

import ahead_of_time
import cuda_kernels
import pytest
import torch
from ahead_of_time import HOPPER, SHARED_LIMIT
from cuda_kernels import KERNELS, captured, zeros
from devices import DEVICE
from turbodiffusion_pack.kernels import ceilings, driver, nvrtc
from turbodiffusion_pack.kernels.checks import Remembered
from turbodiffusion_pack.kernels.int8_linear import hopper as linear
from turbodiffusion_pack.kernels.int8_linear import int8_linear
from turbodiffusion_pack.kernels.qk_prepare import cuda as prepare
from turbodiffusion_pack.kernels.sparse_attention import hopper as attention
from turbodiffusion_pack.kernels.tuning import PREPARE_HEADS, of_card

REALLOCATION = re.compile(r"USETMAXREG\S*\.CTAPOOL +(?:UP\d, *)?(0x[0-9a-f]+)")
needs_nvrtc = pytest.mark.skipif(
    nvrtc.unavailable() is not None, reason=f"no NVRTC: {nvrtc.unavailable()}"
)


@pytest.fixture
def launches(monkeypatch):
    """The launches that a Hopper would get from here on; nothing is compiled or runs."""
    return captured(monkeypatch, HOPPER)


def test_every_file_is_compiled_ahead_of_time():
    files = cuda_kernels.FOLDER.rglob("*.cu")
    assert {file.relative_to(cuda_kernels.FOLDER).as_posix() for file in files} == set(KERNELS)


@needs_nvrtc
@pytest.mark.parametrize(
    ("file", "card"),
    [(file, card) for file, kernel in KERNELS.items() for card in kernel.cards],
    ids=lambda x: x if isinstance(x, str) else "sm_{}{}".format(*x),
)
def test_what_is_launched_fits_the_card(file, card, monkeypatch):
    """So the sizes that .cu files assert are those that launches pass."""
    kernel, launches = KERNELS[file], captured(monkeypatch, card)
    kernel.launch(card)
    chosen = {launch.built for launch in launches if launch.source == cuda_kernels.FOLDER / file}
    assert chosen, "nothing of it was launched"
    (target,) = {target for _, target, *_ in chosen}
    assert target.rstrip("a") == f"sm_{card[0]}{card[1]}"
    built = {of: cuda_kernels.built(*of) for of in chosen}
    assert [b for b in built.items() if b[1].registers > kernel.registers] == []
    spills = kernel.spills_of_card.get(card, kernel.spills)
    assert [b for b in built.items() if b[1].spilled > spills] == []
    assert [b for b in built.items() if b[1].shared > SHARED_LIMIT[card]] == []
    binaries = [b.binary for b in built.values()]
    assert ahead_of_time.machine_products(target, *binaries) == kernel.products(card)
    if card == HOPPER:
        assert [b for b in built.items() if not _pool_suffices(b[1])] == []


def _pool_suffices(built: cuda_kernels.Built) -> bool:
    """Where warpgroups trade registers one gives and two take. For more than the block started with
    they would wait for ever."""
    code = ahead_of_time.machine_code("sm_90a", built.binary)
    traded = sorted({int(x, 16) for x in REALLOCATION.findall(code)})
    if not traded:
        return True
    given, taken = traded
    return given + 2 * taken <= 3 * built.registers


@needs_nvrtc
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_fp8_of_mma_sync_is_emulated_on_hopper_and_data_center_blackwell(target):
    """Why `products_of` leaves it out there: the machine code has fp16 products in its place."""
    place = ceilings.PRODUCTS.index(ceilings.FP8_SHORT)
    sizes = {"shared_bytes": 0, "operands": ceilings.Operands}
    ptx = nvrtc.compile_file(
        ceilings.SOURCE, target.replace("sm", "compute"), **sizes, PRODUCT=place
    )
    named = ahead_of_time.MATRIX_INSTRUCTION.findall(ptx.decode())
    assert set(named) == {"mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16"}
    cubin = nvrtc.compile_file(ceilings.SOURCE, target, **sizes, PRODUCT=place)
    assert ahead_of_time.machine_products(target, cubin) == {"HMMA.16816.F16"}


@needs_nvrtc
@pytest.mark.parametrize("size", ["shared_bytes", "operands"])
def test_a_size_that_differs_does_not_compile(size):
    sizes = {"shared_bytes": linear.SHARED_BYTES, "operands": linear.Operands}
    sizes[size] = {"shared_bytes": linear.SHARED_BYTES - 16, "operands": attention.Operands}[size]
    with pytest.raises(RuntimeError, match="static assertion failed"):
        nvrtc.compile_file(linear.SOURCE, linear.TARGET, **sizes, BF16=1)


@needs_nvrtc
@pytest.mark.parametrize("file", KERNELS)
def test_python_and_cuda_agree_on_operands_and_sizes(file, monkeypatch, tmp_path):
    """Every field of an `Operands` lies where the compiler sees it, and tiles are as large."""
    kernel = KERNELS[file]
    launches = captured(monkeypatch, kernel.cards[0])
    kernel.launch(kernel.cards[0])
    launch = next(x for x in launches if x.source == cuda_kernels.FOLDER / file)
    source, target, *sizes, constants = launch.built
    operands = type(launch.operands)
    facts = [f"{name} == {size}" for name, size in kernel.sizes.items()]
    facts.append(f"THREADS == {launch.threads}")
    for name, _ in operands._fields_:
        if name != "end":
            offset = getattr(operands, name).offset
            # `offsetof`, for which NVRTC has no header.
            facts.append(f"__INTADDR__(&((Operands*)0)->{name}) == {offset}")
    checked = tmp_path / "checked.cu"
    checks = "".join(f"static_assert({fact});\n" for fact in facts)
    checked.write_text(source.read_text(encoding="utf-8") + checks, encoding="utf-8")
    ptx = target.replace("sm", "compute")  # sooner made than machine code
    nvrtc.compile_file(checked, ptx, *sizes, **dict(constants))


def test_operands_say_what_was_given(launches):
    x, w = zeros(1, 70, 128, dtype=torch.int8), zeros(256, 128, dtype=torch.int8)
    residual, gate = zeros(1, 70, 256, dtype=torch.bfloat16), zeros(1, 1, 256)
    out = int8_linear(
        x, zeros(1, 70), w, zeros(256), gate=gate, residual=residual, backend="triton"
    )
    (launch,) = launches
    found = launch.operands
    assert list(found.x_map[:2]) == [x.data_ptr(), linear.TILE_L]
    assert list(found.w_map[:2]) == [w.data_ptr(), linear.TILE_N // 2]
    assert found.x_map[-1] == found.w_map[-1] == 256
    assert found.bias is None
    pointers = found.gate, found.residual, found.out
    assert pointers == tuple(t.data_ptr() for t in (gate, residual, out))
    assert (found.batch, found.length, found.n, found.k) == (1, 70, 256, 128)
    assert (found.gate_b, found.residual_l, found.out_l) == (256, 256, 256)


def test_shared_memory_fits():
    assert SHARED_LIMIT[HOPPER] >= attention.SHARED_BYTES
    assert SHARED_LIMIT[HOPPER] >= linear.SHARED_BYTES
    assert SHARED_LIMIT[HOPPER] >= 2 * prepare.shared_bytes(prepare.ROWS, True, True)


@pytest.mark.parametrize("card", PREPARE_HEADS, ids="sm_{0[0]}{0[1]}".format)
def test_each_thread_copies_four_weights_of_its_program_at_most(card):
    heads, threads = of_card(PREPARE_HEADS, card), 2 * prepare.rows_of_program(card, 64)
    assert heads <= prepare.MOST_HEADS
    assert heads * prepare.HEAD_DIM <= 4 * threads


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
    monkeypatch.setattr(nvrtc, "driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "address", torch.Tensor.data_ptr)
    monkeypatch.setattr(nvrtc, "_maps", Remembered())
    x = torch.zeros(3, 256, 256, dtype=torch.int8)
    others = x[1:], x[:, :128], x[..., :128], x[:, ::2], x[0]
    maps = [nvrtc.tensor_map(x, 128)[0], *(nvrtc.tensor_map(other, 128)[0] for other in others)]
    assert maps == [1, 2, 3, 4, 5, 6]
    assert nvrtc.tensor_map(x, 64)[0] == 7
    assert nvrtc.tensor_map(x.clone(), 128)[0] == 8
    assert nvrtc.tensor_map(x, 128, 256)[0] == 9
    assert nvrtc.tensor_map(x, 128)[0] == 1


@pytest.mark.parametrize("full", [1, 2])
def test_a_kernels_code_is_loaded_again_behind_torchs_cache(monkeypatch, full):
    asked = []

    def load(*_):
        asked.append("load")
        return driver.OUT_OF_MEMORY if asked.count("load") <= full else 0

    calls = dict.fromkeys(("cuModuleGetFunction", "cuFuncSetAttribute"), lambda *_: 0)
    calls |= {"cuModuleLoadData": load, "cuGetErrorString": lambda *_: 0}
    monkeypatch.setattr(driver, "driver", lambda: types.SimpleNamespace(**calls))
    monkeypatch.setattr(nvrtc, "driver", driver.driver)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    stream = types.SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: asked.append(name))
    again = pytest.raises(torch.OutOfMemoryError) if full == 2 else contextlib.nullcontext()
    with again:
        assert nvrtc._on_device(b"", "kernel", 0, 0).device == 0
    assert asked == ["load", "synchronize", "empty_cache", "load"]


@needs_nvrtc
def test_constants_are_defined():
    source = 'static_assert(SIZE == 7); extern "C" __global__ void f() {}'
    assert nvrtc.compile_cuda(source, "sm_90", SIZE=7)


def test_a_thread_gives_products_the_channels_that_it_holds():
    """And of four products' columns it gets as many, side by side."""
    columns, summands = (x.flatten() for x in prepare.order(torch.device("cpu")))
    held = torch.arange(prepare.HEAD_DIM).view(4, 4, 8)  # [tile of 32, thread, channel]
    # [tile, product, half of its summands, thread, pair] and [tile, product, thread, pair]
    given = summands.view(4, 2, 2, 4, 2).permute(0, 3, 1, 2, 4).flatten(2)
    left = columns.view(4, 4, 4, 2).permute(0, 2, 1, 3).flatten(2)
    assert given.equal(held) and left.equal(held)


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
