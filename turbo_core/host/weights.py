"""The weights of ComfyUI's ops, fetched from wherever the host keeps them: GPU, RAM or file."""

import math
import mmap
from collections.abc import Callable

import comfy.model_management
import comfy.ops
import torch

from . import per_run
from .arrivals import bytes_of, came, is_away, signature_of, waiting
from .gradients import records_graph
from .int8_tensor import is_int8
from .versions import MANAGED, REQUANTIZED

Fetched = tuple[torch.Tensor, torch.Tensor | None]  # a weight and its bias


class fetched:  # noqa: N801 - read as a function; a generator costs more, 16 times a block
    """A context with the weight and bias of a comfy op on `device`, for as long as it lasts.

    Floats come in `dtype`; INT8 weights stay INT8 unless a patch is added to them on the way. The
    host has the weight back afterwards, whatever happens: one that it never gets back stays pinned
    on the GPU.
    """

    __slots__ = ("device", "dtype", "given", "op")

    def __init__(self, op: torch.nn.Module, dtype: torch.dtype, device: torch.device):
        self.op, self.dtype, self.device = op, dtype, device

    def __enter__(self) -> Fetched:
        self.given = None
        if (own := resident(self.op, self.dtype, self.device)) is not None:
            return own
        own, dtype = self.op.weight, self.dtype
        int8 = is_int8(own)
        weight_dtype = own.dtype if int8 and not self.op.weight_function else dtype
        options = REQUANTIZED if int8 else {}
        asked = {"dtype": weight_dtype, "device": self.device, "bias_dtype": dtype, **options}
        if is_away(self.op, self.device):
            signature = signature_of(self.op)
            with waiting(self.device) as wait:
                self.given = comfy.ops.cast_bias_weight(self.op, offloadable=True, **asked)
                wait.size = bytes_of(self.op) if came(self.op, signature) else 0
        else:
            self.given = comfy.ops.cast_bias_weight(self.op, offloadable=True, **asked)
        try:
            weight, bias, _ = self.given
            # What dynamic VRAM has just patched is in the dtype that it keeps.
            weight = weight if is_int8(weight) else weight.to(weight_dtype)
            return weight, None if bias is None else bias.to(dtype)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_) -> None:
        if self.given is not None:
            comfy.ops.uncast_bias_weight(self.op, *self.given)


def resident(op: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> Fetched | None:
    """The op's own weight and bias where the host would give just these; None where it may not.

    The host's function comes to the same, in ten times as long, and a block asks 16 times.
    """
    weight, bias = op._parameters.get("weight"), op._parameters.get("bias")
    if weight is None or weight.device != device or (weight.dtype != dtype and not is_int8(weight)):
        return None
    if bias is not None and (bias.device != device or bias.dtype != dtype):
        return None
    own = op.__dict__  # the host's RMSNorm has its bias, None, there
    if MANAGED in own or own.get("bias") is not None or op.weight_function or op.bias_function:
        return None
    return weight, bias


# Bytes of RAM that are left to others by what is kept or pinned there for speed alone.
LEFT_TO_OTHERS = 6 * 2**30

OWN_PAGES = 2**20  # bytes of a weight that is worth some


def ram_allows(size: int) -> bool:
    """Whether so many bytes of RAM may be held for speed alone."""
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    return free - size > LEFT_TO_OTHERS


def in_ram(weight: torch.Tensor) -> torch.Tensor | None:
    """The parameter that `weight` is in RAM: itself, or what it was copied from to the GPU."""
    return weight if weight.device.type == "cpu" else getattr(weight, "in_ram", None)


def room_for(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Room for the integers of an INT8 weight on `device`, for as long as its model lives.

    In RAM it has pages of its own, which the system has back with it: Linux's C library would take
    it from a heap, and keep as much of a model that is gone as came before anything that stays.
    """
    size = math.prod(shape)
    if device.type != "cpu" or size < OWN_PAGES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=torch.int8, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.int8).view(shape)


def to_keep(integers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The integers of an INT8 weight, made elsewhere perhaps, on `device`."""
    if integers.device == device:
        return integers
    return room_for(integers.shape, device).copy_(integers)


def moved(weight: torch.nn.Parameter, move: Callable) -> torch.nn.Parameter:
    """The parameter that move(weight), as torch.nn.Module.to has it, makes.

    A weight that goes back to RAM is what it was there, without a copy: nobody writes to one on the
    GPU but an optimizer, and `Linear.set_weight`, which says so. What is in RAM is kept for that
    while there is room; a file's takes none.
    """
    home = None if weight.requires_grad else in_ram(weight)
    if home is not None:
        empty = torch.empty(0, dtype=_dtype_of(weight), device=weight.device)
        there = move(empty)
        if (there.device, there.dtype) == (home.device, _dtype_of(home)):
            return home
    new = move(weight)
    if new is weight:
        return weight
    new = torch.nn.Parameter(new, weight.requires_grad)
    if home is not None and (home.is_pinned() or ram_allows(0)):
        new.in_ram = home
    return new


def _dtype_of(weight: torch.Tensor) -> torch.dtype:
    """What is moved: hosts differ in what they take a quantized tensor for."""
    return torch.int8 if is_int8(weight) else weight.dtype


def kept(given: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """What the host gave for an op's `own` tensor, safe to keep: a copy where it is not itself.

    The host reuses the buffer that it streams a weight into for the next ops.
    """
    same = given.device == own.device and given.data_ptr() == own.data_ptr()
    return given if same else given.clone()


def float32_weights(op: torch.nn.Module, device: torch.device) -> Fetched:
    """Weight and bias of a small comfy op in float32 on `device`, to keep; once in a run, unless
    they are trained in it."""
    if (own := resident(op, torch.float32, device)) is not None:
        return own
    if records_graph(op):
        return _float32_weights(op, device)
    return per_run.made((op, device), lambda: _float32_weights(op, device))


def _float32_weights(op: torch.nn.Module, device: torch.device) -> Fetched:
    with fetched(op, torch.float32, device) as (weight, bias):
        return kept(weight, op.weight), None if bias is None else kept(bias, op.bias)
