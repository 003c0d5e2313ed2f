"""CUDA C++ for what Triton cannot say, compiled at run time by the NVRTC that torch brings."""

import ctypes
import functools
import sys
from pathlib import Path

import torch

from .checks import Remembered
from .driver import check, driver, recorder, start, with_room

# What the kernels include.
HEADER_NAMES = "arithmetic.cuh", "hopper.cuh", "keys.cuh", "mma.cuh", "rows.cuh"
HEADERS = tuple(map(Path(__file__).with_name, HEADER_NAMES))
TENSOR_MAP = ctypes.c_uint64 * 16
ONE_PARAMETER = ctypes.c_void_p * 1


def operands(pointers: str, integers: str, maps: str = "") -> type[ctypes.Structure]:
    """The one parameter of a kernel, the `Operands` of its file: names of its fields in order.

    Tensor maps come first, so that they lie at multiples of 64 bytes, then pointers, then int32.
    """
    fields = [(name, TENSOR_MAP) for name in maps.split()]
    fields += [(name, ctypes.c_void_p) for name in pointers.split()]
    fields += [(name, ctypes.c_int32) for name in integers.split()]
    size = sum(ctypes.sizeof(kind) for _, kind in fields)
    if maps:
        fields.append(("end", ctypes.c_byte * (-size % 64)))  # as the maps' alignment makes it in C
    made = type("Operands", (ctypes.Structure,), {"_fields_": fields})
    made.places = [[getattr(made, n).offset for n in names.split()] for names in (pointers, maps)]
    return made


def tensor_map(x: torch.Tensor, box: int | tuple[int, ...], fetched: int = 128) -> ctypes.Array:
    """What the copy engine (TMA) knows of a tensor; a kernel's operands hold it by value.

    It copies a box at a time, 0 before the beginning and beyond the end, with chunks of 16 bytes
    swizzled as the tensor cores read them.

    Args:
        x: int8, fp16 or bf16, contiguous along its last dimension, all other strides and the
            address multiples of 16 bytes.
        box: its size in each dimension, at most 256, the last one of 64 or 128 bytes; a number
            stands for so many rows of 128 columns.
        fetched: bytes of a row that come into L2 at a time, 128 or 256.

    Raises:
        ValueError: x is not on a GPU.
        RuntimeError: the driver refuses.
    """
    key = address(x), x.itemsize, x.shape, x.stride(), box, fetched
    found = map_of(*key)
    if (tape := recorder()) is not None:
        tape.mapped(found, key)
    return found


# Torch's allocator hands out the same addresses in every block and forward pass.
_maps = Remembered()


def map_of(pointer: int, *layout: object) -> ctypes.Array:
    """The tensor map of what lies at `pointer`, see `_encoded`, made once."""
    key = pointer, *layout
    known = _maps.get(key)  # another thread may empty it in between
    return _maps.put(key, _encoded(*key)) if known is None else known


def _encoded(
    pointer: int,
    itemsize: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    box: int | tuple[int, ...],
    fetched: int,
) -> ctypes.Array:
    """The tensor map of what these numbers say, and nothing else: the driver looks at no memory."""
    if isinstance(box, int):
        box = (1, box, 128)[-len(shape) :]
    sizes, boxes, rank = shape[::-1], box[::-1], len(shape)
    steps = [itemsize * stride for stride in strides[-2::-1]]
    memory = (ctypes.c_uint64 * 24)()  # the map takes 16 of it, at a multiple of 64 bytes
    aligned = TENSOR_MAP.from_buffer(memory, -ctypes.addressof(memory) % 64)
    integers = {1: 0, 2: 1}[itemsize]  # zeros are the same in all of 16 bits
    swizzle = {64: 2, 128: 3}[itemsize * boxes[0]]
    plain, promotion, zeros = 0, {128: 2, 256: 3}[fetched], 0
    code = driver().cuTensorMapEncodeTiled(
        aligned, integers, rank, ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * rank)(*sizes), (ctypes.c_uint64 * rank)(*steps),
        (ctypes.c_uint32 * rank)(*boxes), (ctypes.c_uint32 * rank)(*[1] * rank),
        plain, swizzle, promotion, zeros,
    )  # fmt: skip
    check(code)
    return aligned


def target_of(card: tuple[int, int], device: torch.device) -> str:
    """What to compile for `device`, taken for a card of this compute capability.

    Machine code; but where an older card is pretended PTX for that card, of which the driver makes
    machine code for the one there is: the instructions are the older card's.
    """
    real = torch.cuda.get_device_capability(device)
    return f"{'sm' if card == real else 'compute'}_{card[0]}{card[1]}"


@functools.cache
def version() -> tuple[int, int]:
    """Of NVRTC, which is that of its CUDA toolkit."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check_nvrtc(_nvrtc(), _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def address(x: torch.Tensor | None) -> int:
    """Where x lies on the GPU; 0, the null pointer, for None.

    It holds as long as x does: keep what you copied until the launch.

    Raises:
        ValueError: x is not on a GPU.
    """
    if x is None:
        return 0
    if not x.is_cuda:
        raise ValueError(f"a kernel's tensors must be on the GPU, got one on {x.device}")
    return x.data_ptr()


class Kernel:
    """A compiled kernel on one device."""

    def __init__(self, function: ctypes.c_void_p, shared_bytes: int, device: int):
        self.function, self.shared_bytes, self.device = function, shared_bytes, device

    def launch(self, programs: int, threads: int, operands: ctypes.Structure) -> None:
        """Start on torch's current stream, with the one parameter that the kernel takes.

        Raises:
            RuntimeError: the driver refuses.
        """
        grid, parameters = (programs, 1, 1), ONE_PARAMETER(ctypes.addressof(operands))
        start(self.function, grid, threads, self.shared_bytes, self.device, parameters)
        if (tape := recorder()) is not None:
            tape.launched(self, grid, threads, bytes(operands), [0], *operands.places)


@functools.cache
def unavailable() -> str | None:
    """Why nothing can be compiled at run time; None where it can."""
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    try:
        compile_cuda('extern "C" __global__ void nothing() {}', _this_card())
    except (OSError, RuntimeError) as error:
        return f"torch's NVRTC does not work ({error})"
    return None


def _this_card() -> str:
    """What to compile for on this machine: an older NVRTC does not know a newer card."""
    if not torch.cuda.is_available():
        return "sm_90"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


_loaded = {}


def load(
    source: Path,
    name: str,
    target: str,
    shared_bytes: int,
    operands: type[ctypes.Structure],
    device: int,
    **constants: int,
) -> Kernel:
    """Compile the kernel `name` of a file, see `compile_file`, and load it on `device`.

    Done once for each device and set of `constants`, in about a second.

    Raises:
        RuntimeError: it does not compile, or the driver does not take it.
    """
    key = str(source), name, target, shared_bytes, operands, device, *constants.items()
    if (kernel := _loaded.get(key)) is None:
        binary = compile_file(source, target, shared_bytes, operands, **constants)
        kernel = _loaded[key] = _on_device(binary, name, shared_bytes, device)
    return kernel


def _on_device(binary: bytes, name: str, shared_bytes: int, device: int) -> Kernel:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # torch makes its context here at the latest
        with_room(lambda: check(driver().cuModuleLoadData(ctypes.byref(module), binary)))
        check(driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()))
        most_dynamic_shared_bytes = 8
        check(driver().cuFuncSetAttribute(function, most_dynamic_shared_bytes, shared_bytes))
    return Kernel(function, shared_bytes, device)


def compile_file(
    source: Path,
    target: str,
    shared_bytes: int,
    operands: type[ctypes.Structure],
    **constants: int,
) -> bytes:
    """A file as machine code for `target` (as sm_90a), or as PTX (compute_89); needs no GPU.

    `constants` are defined before its first line, and the sizes of what a launch passes:
    SHARED_BYTES and OPERANDS_BYTES.
    """
    sizes = {"SHARED_BYTES": shared_bytes, "OPERANDS_BYTES": ctypes.sizeof(operands)}
    return compile_cuda(source.read_text(encoding="utf-8"), target, **sizes, **constants)


def compile_cuda(source: str, target: str, **constants: int) -> bytes:
    """CUDA C++ as machine code for one architecture, or as PTX for a virtual one; needs no GPU.

    Raises:
        RuntimeError: it does not compile; the message holds the compiler's.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    headers = ctypes.c_char_p * len(HEADERS)
    texts = headers(*(header.read_bytes() for header in HEADERS))
    names = headers(*(header.name.encode() for header in HEADERS))
    arguments = source.encode(), b"kernel.cu", len(HEADERS), texts, names
    _check_nvrtc(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), *arguments))
    flags = [f"--gpu-architecture={target}", "--std=c++17"]
    flags += [f"--define-macro={name}={value}" for name, value in constants.items()]
    options = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), options)
    kind = "PTX" if target.startswith("compute") else "CUBIN"
    output = _output(nvrtc, program, "ProgramLog" if failed else kind)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        told = output.rstrip(b"\0").decode(errors="replace").strip()
        raise RuntimeError(f"NVRTC cannot compile for {target}: {told}")
    return output


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = torch.version.cuda.split(".")[0]
    return ctypes.CDLL(
        f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    )


def _output(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, kind: str) -> bytes:
    size = ctypes.c_size_t()
    _check_nvrtc(nvrtc, getattr(nvrtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
    output = ctypes.create_string_buffer(size.value)
    _check_nvrtc(nvrtc, getattr(nvrtc, f"nvrtcGet{kind}")(program, output))
    return output.raw


def _check_nvrtc(nvrtc: ctypes.CDLL, code: int) -> None:
    if code:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(code).decode()}")
