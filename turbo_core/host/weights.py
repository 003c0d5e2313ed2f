"""The weights of ComfyUI's ops, fetched from wherever the host keeps them: GPU, RAM or file."""

import contextlib
from collections.abc import Iterator

import comfy.ops
import torch

from .int8_tensor import is_int8
from .versions import REQUANTIZED

Fetched = tuple[torch.Tensor, torch.Tensor | None]  # a weight and its bias


@contextlib.contextmanager
def fetched(op: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[Fetched]:
    """Weight and bias of a comfy op on `device`, for as long as the context lasts.

    Floats come in `dtype`; INT8 weights stay INT8 unless a patch is added to them on the way. The
    host has the weight back afterwards, whatever happens: one that it never gets back stays pinned
    on the GPU.
    """
    patched = len(op.weight_function) > 0
    int8 = is_int8(op.weight)
    weight_dtype = op.weight.dtype if int8 and not patched else dtype
    options = {"bias_dtype": dtype, "offloadable": True, **(REQUANTIZED if int8 else {})}
    weight, bias, stream = comfy.ops.cast_bias_weight(
        op, dtype=weight_dtype, device=device, **options
    )
    try:
        # What dynamic VRAM has just patched is in the dtype that it keeps.
        cast = weight if is_int8(weight) else weight.to(weight_dtype)
        yield cast, None if bias is None else bias.to(dtype)
    finally:
        comfy.ops.uncast_bias_weight(op, weight, bias, stream)


def kept(given: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """What the host gave for an op's `own` tensor, safe to keep: a copy where it is not itself.

    The host reuses the buffer that it streams a weight into for the next ops.
    """
    same = given.device == own.device and given.data_ptr() == own.data_ptr()
    return given if same else given.clone()


def float32_weights(op: torch.nn.Module, device: torch.device) -> Fetched:
    """Weight and bias of a small comfy op in float32 on `device`, to keep."""
    with fetched(op, torch.float32, device) as (weight, bias):
        return kept(weight, op.weight), None if bias is None else kept(bias, op.bias)
