"""The linear branch's sums over keys by mma.sync, for GeForce cards and A100: mma.cu."""

import ctypes
from pathlib import Path

import torch

from .. import nvrtc
from ..checks import in_steps_of_16_bytes
from ..dispatch import capability
from ..sparse_attention.mma import VALUE_LIMIT
from .triton import room_for_sums

SOURCE = Path(__file__).with_suffix(".cu")
HEAD_DIM = 128
THREADS = 256
TILE, BLOCK = 32, 64  # keys of a step, and that share a scale where they are int8
# mma.cu's Shared, of which two fit a multiprocessor of 100 KB: keys, values and weights of two
# tiles; of keys in int8 also their center.
SHARED_BYTES = 2 * 3 * TILE * HEAD_DIM * 2
INT8_SHARED_BYTES = 2 * 5 * TILE * HEAD_DIM + 4 * HEAD_DIM + 16
Operands = nvrtc.operands(
    pointers="k v state normalizer maxima",
    integers="length heads heads_in_all rows k_b k_l k_h v_b v_l v_h",
)
Int8Operands = nvrtc.operands(
    pointers="k k_scale center values bound v state normalizer maxima",
    integers="length heads heads_in_all rows k_heads k_blocks v_b v_l v_h",
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
    if max(*k.stride(), *v.stride()) >= 2**31:
        return "strides exceed int32"
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
    layout = k.stride()[:3]
    return _sums(Operands, (k,), layout, v, of_heads, SHARED_BYTES, INT8=0, FP8=0)


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
    batch, _, heads, _ = v.shape
    k_heads = integers.stride(0) // integers.stride(1) if batch > 1 else heads
    keys, layout = (integers, scale, center, values, bound), (k_heads, scale.shape[2])
    constants = {"FP8": int(values.dtype == torch.float8_e4m3fn), "VALUE_LIMIT": int(VALUE_LIMIT)}
    return _sums(Int8Operands, keys, layout, v, of_heads, INT8_SHARED_BYTES, INT8=1, **constants)


def _sums(
    kind: type[ctypes.Structure],
    keys: tuple[torch.Tensor, ...],
    layout: tuple[int, ...],
    v: torch.Tensor,
    of_heads: int | None,
    shared_bytes: int,
    **constants: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """State, normalizer and the largest |v|, of `keys` as this `kind` of operands has them."""
    batch, length, heads, _ = v.shape
    rows, state, normalizer = room_for_sums(v, of_heads, BLOCK)
    maximum = torch.empty_like(normalizer)
    operands = kind(
        *map(nvrtc.address, (*keys, v, state, normalizer, maximum)),
        length, heads, batch * heads, rows, *layout, *v.stride()[:3],
    )  # fmt: skip
    kernel = nvrtc.load(
        SOURCE, "key_value_state", nvrtc.target_of(capability(v.device), v.device), shared_bytes,
        kind, v.device.index, BF16=int(v.dtype == torch.bfloat16), **constants,
    )  # fmt: skip
    kernel.launch(len(state) * batch * heads, THREADS, operands)
    return state.sum(0), normalizer.sum(0), maximum.amax(0)
