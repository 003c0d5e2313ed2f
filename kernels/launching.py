"""Starts Triton kernels with little Python: their arguments are packed once a shape.

Triton binds, inspects and packs all arguments at every launch. Here it does so once for each set of
dtypes, numbers and constants; later launches with the same look up what came of it, write the
addresses of their tensors into it and start the kernel themselves.
"""

import ctypes
import functools
import re
import struct

import torch

from .checks import Remembered
from .dispatch import launching_on
from .driver import recorder, start, with_room

SLOT = 8  # bytes of an argument
# By Triton's types of numbers: what packs one, and what it is in PTX.
NUMBERS = {
    "i32": ("i", "u32"),
    "u32": ("I", "u32"),
    "i64": ("q", "u64"),
    "u64": ("Q", "u64"),
    "fp32": ("f", "f32"),
}
POINTER = "u64"
PARAMETER = re.compile(r"\.param \.(\w+)")
MOST_SHARED = 227 * 1024  # bytes; above, Triton asks the driver for more than a launch here does


class Ready:
    """A compiled kernel and its arguments, of which only the tensors' addresses are missing."""

    def __init__(self, compiled, arguments: dict[str, object], device: int):
        """`compiled` is Triton's, `arguments` what it was launched with by name, in its order."""
        self.compiled = compiled  # unloads itself once nobody holds it
        self.device, self.shared_bytes = device, compiled.metadata.shared
        self.function = ctypes.c_void_p(compiled.function)
        self.threads = 32 * compiled.metadata.num_warps
        kinds = taken(compiled)
        self.numbers = ctypes.create_string_buffer(SLOT * (len(kinds) + 2))
        self.places, pointers = [], 0  # by argument: among the pointers, or in `numbers`
        for i, (name, kind) in enumerate(kinds):
            if kind.startswith("*"):
                self.places.append((True, pointers))
                pointers += 1
            else:
                struct.pack_into(NUMBERS[kind][0], self.numbers, SLOT * i, arguments[name])
                self.places.append((False, i))
        # Two null pointers: memory that Triton gives some kernels, but not these.
        self.places += [(False, len(kinds)), (False, len(kinds) + 1)]
        self.pack = struct.Struct(f"{pointers}Q").pack_into
        self.spare = []  # of those below; a launch takes one, for there may be several threads

    def _parameters(self) -> tuple[ctypes.Array, ctypes.Array]:
        """Room for the tensors' addresses, and where each argument lies."""
        addresses = ctypes.create_string_buffer(SLOT * len(self.places))
        bases = ctypes.addressof(self.numbers), ctypes.addressof(addresses)
        places = (bases[pointer] + SLOT * i for pointer, i in self.places)
        return addresses, (ctypes.c_void_p * len(self.places))(*places)

    def launch(self, grid: tuple[int, ...], pointers: list[int]) -> None:
        """Start the kernel on tensors at these addresses, in the order of its arguments."""
        try:
            addresses, parameters = room = self.spare.pop()
        except IndexError:
            addresses, parameters = room = self._parameters()
        self.pack(addresses, 0, *pointers)
        grid = *grid, *(1, 1, 1)[len(grid) :]
        start(self.function, grid, self.threads, self.shared_bytes, self.device, parameters)
        if (tape := recorder()) is not None:
            self._tell(tape, grid, addresses)
        self.spare.append(room)

    def _tell(self, tape, grid: tuple[int, int, int], addresses: ctypes.Array) -> None:
        """A launch was done with these addresses: behind the numbers they are told as well."""
        numbers = bytes(self.numbers)
        arguments = [SLOT * i + pointer * len(numbers) for pointer, i in self.places]
        pointers = [at for at in arguments if at >= len(numbers)]
        tape.launched(self, grid, self.threads, numbers + bytes(addresses), arguments, pointers)


def taken(compiled) -> list[tuple[str, str]]:
    """Names and types of the arguments that a compiled Triton kernel takes at its launch."""
    return [(name, kind) for name, kind in compiled.src.signature.items() if kind != "constexpr"]


def why_triton(compiled) -> str | None:
    """Why Triton has to launch what it compiled; None where it can be started from here."""
    if compiled is None:
        return "it runs in the interpreter"
    made = compiled.metadata
    kinds = [kind for _, kind in taken(compiled)]
    if any(kind not in NUMBERS and not kind.startswith("*") for kind in kinds):
        return "it takes arguments of another kind"
    if made.num_ctas != 1 or made.launch_cooperative_grid or made.launch_pdl:
        return "its programs work together"
    if made.global_scratch_size or made.profile_scratch_size or made.shared > MOST_SHARED:
        return "it asks for memory"
    expected = [POINTER if kind.startswith("*") else NUMBERS[kind][1] for kind in kinds]
    entry = compiled.asm["ptx"].partition(".entry")[2].partition(")")[0]
    if PARAMETER.findall(entry) != [*expected, POINTER, POINTER]:
        return "this Triton passes other arguments"
    return None


class Launched:
    """A Triton kernel, launched as Triton launches it: `kernel[grid](*arguments, **constants)`.

    Its tensors, or None in their place, are its first arguments, which are called `..._ptr`.
    """

    def __init__(self, kernel):
        self.kernel, self.ready, self.only_triton = kernel, Remembered(), None
        self.tensors = sum(name.endswith("_ptr") for name in kernel.arg_names)

    def __getitem__(self, grid: tuple[int, ...]):
        if torch.compiler.is_compiling():  # which knows Triton's kernels, and no addresses
            return self.kernel[grid]
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *arguments, **constants) -> None:
        """Start the kernel on tensors of one GPU."""
        tensors = arguments[: self.tensors]
        # All that Triton compiles for, and all numbers.
        key = [*constants, *constants.values(), *arguments[self.tensors :]]
        pointers, together = [], 0
        for x in tensors:
            if x is None:
                key.append(None)
                continue
            pointers.append(pointer := x.data_ptr())
            together |= pointer
            key.append(x.dtype)
            key.append(x.get_device())
        key.append(together % 16)
        if (ready := self.ready.get(key := tuple(key))) is not None:
            ready.launch(grid, pointers)
            return
        if (tape := recorder()) is not None:
            tape.refuse("Triton launches a kernel for the first time")
        devices = [x.get_device() for x in tensors if x is not None]
        with launching_on(tensors[0]):
            compiled = with_room(lambda: self.kernel[grid](*arguments, **constants))
        usual = together % 16 == 0 and len(set(devices)) == 1 and devices[0] >= 0
        if usual and self.only_triton is None:
            self.only_triton = why_triton(compiled)
        if usual and self.only_triton is None:
            named = dict(zip(self.kernel.arg_names, arguments, strict=False)) | constants
            self.ready.put(key, Ready(compiled, named, devices[0]))


def launched(kernel) -> Launched:
    """Decorates a Triton kernel that takes no tensor maps, whose launches shall cost little."""
    return Launched(kernel)
