"""The linear branch's sums over keys on Hopper, in CUDA C++: see hopper.cu."""

from pathlib import Path

import torch

from .. import nvrtc
from ..checks import in_steps_of_16_bytes
from .triton import room_for_sums

SOURCE = Path(__file__).with_suffix(".cu")
TARGET = "sm_90a"
HEAD_DIM, TILE, STAGES = 128, 64, 3
THREADS = 256
# Alignment and hopper.cu's Shared.
SHARED_BYTES = 1024 + STAGES * (2 * TILE * HEAD_DIM * 2 + 8)
Operands = nvrtc.operands(
    maps="k_map v_map",
    pointers="state normalizer maxima",
    integers="length heads heads_in_all rows",
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
    batch, length, heads, _ = k.shape
    rows, state, normalizer = room_for_sums(k, of_heads, TILE)
    maximum = torch.empty_like(normalizer)
    box = 1, TILE, HEAD_DIM // 2
    operands = Operands(
        nvrtc.tensor_map(k.flatten(2), box), nvrtc.tensor_map(v.flatten(2), box),
        *map(nvrtc.address, (state, normalizer, maximum)), length, heads, batch * heads, rows,
    )  # fmt: skip
    kernel = nvrtc.load(
        SOURCE, "key_value_state", TARGET, SHARED_BYTES, Operands, k.device.index,
        BF16=int(k.dtype == torch.bfloat16),
    )  # fmt: skip
    kernel.launch(len(state) * batch * heads, THREADS, operands)
    return state.sum(0), normalizer.sum(0), maximum.amax(0)
