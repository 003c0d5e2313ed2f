"""The linear branch's sums over keys on Hopper, in CUDA C++: see hopper.cu."""

from collections.abc import Callable
from pathlib import Path

import torch

from .. import nvrtc
from ..checks import in_steps_of_16_bytes
from .triton import room_for_sums

SOURCE = Path(__file__).with_suffix(".cu")
TARGET = "sm_90a"
VALUES = (torch.float8_e4m3fn,)  # what v may become beside keys in int8
HEAD_DIM, TILE, STAGES = 128, 64, 3
THREADS = 256
# Alignment and hopper.cu's Shared; that of keys in int8.
SHARED_BYTES = 1024 + STAGES * (2 * TILE * HEAD_DIM * 2 + 8)
INT8_SHARED_BYTES = 1024 + STAGES * (3 * TILE * HEAD_DIM + 8) + (4 * TILE + 9) * HEAD_DIM + 8
Operands = nvrtc.operands(
    maps="v_map k_map",
    pointers="state normalizer maxima",
    integers="length heads heads_in_all rows",
)
Int8Operands = nvrtc.operands(
    maps="v_map",
    pointers="k k_scale center values bound state normalizer maxima",
    integers="length heads heads_in_all rows k_heads k_blocks",
)


def unfit(k: torch.Tensor, v: torch.Tensor, feature_map: str) -> str | None:
    """Why the kernel cannot sum over these keys; None where it can."""
    if k.shape[-1] != HEAD_DIM:
        return f"the head dim is {k.shape[-1]}, not {HEAD_DIM}"
    # The only one that models were trained with.
    if feature_map != "softmax":
        return f"the feature map is {feature_map}"
    if not (in_steps_of_16_bytes(k) and in_steps_of_16_bytes(v)):
        return "rows do not begin at multiples of 16 bytes"
    if not k.stride(2) == v.stride(2) == HEAD_DIM:
        return "heads do not lie side by side"
    return None


def key_value_state(
    k: torch.Tensor, v: torch.Tensor, feature_map: str, of_heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`key_value_state` of the Triton file, of what is not `unfit`."""
    return key_value_state_and_maximum(k, v, feature_map, of_heads)[:2]


def key_value_state_and_maximum(
    k: torch.Tensor, v: torch.Tensor, feature_map: str, of_heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`key_value_state_and_maximum` of the Triton file, of what is not `unfit`."""
    box = 1, TILE, HEAD_DIM // 2
    maps = (nvrtc.tensor_map(x.flatten(2), box) for x in (v, k))
    return _sums(v, of_heads, lambda made, sizes: Operands(*maps, *made, *sizes))


def state_of_int8_keys(
    integers: torch.Tensor,
    scale: torch.Tensor,
    center: torch.Tensor,
    v: torch.Tensor,
    values: torch.Tensor,
    bound: torch.Tensor,
    of_heads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `state_of_int8_keys` of the package."""
    k_heads = integers.stride(0) // integers.stride(1) if len(v) > 1 else v.shape[2]
    keys = tuple(map(nvrtc.address, (integers, scale, center, values, bound)))
    v_map = nvrtc.tensor_map(v.flatten(2), (1, TILE, HEAD_DIM // 2))
    blocks = scale.shape[2]
    return _sums(
        v, of_heads, lambda made, sizes: Int8Operands(v_map, *keys, *made, *sizes, k_heads, blocks),
        int8=True,
    )  # fmt: skip


def _sums(
    v: torch.Tensor, of_heads: int | None, operands: Callable, int8: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """State, normalizer and the largest |v|, of keys that `operands` adds to what there is."""
    batch, length, heads, _ = v.shape
    rows, state, normalizer = room_for_sums(v, of_heads, TILE)
    maximum = torch.empty_like(normalizer)
    made = map(nvrtc.address, (state, normalizer, maximum))
    arguments = operands(tuple(made), (length, heads, batch * heads, rows))
    kernel = nvrtc.load(
        SOURCE, "key_value_state", TARGET, INT8_SHARED_BYTES if int8 else SHARED_BYTES,
        type(arguments), v.device.index, BF16=int(v.dtype == torch.bfloat16), INT8=int(int8),
    )  # fmt: skip
    kernel.launch(len(state) * batch * heads, THREADS, arguments)
    return state.sum(0), normalizer.sum(0), maximum.amax(0)
