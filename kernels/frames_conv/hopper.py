"""Convolutions of frames on Hopper, in CUDA C++: see hopper.cu."""

from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc
from ..dispatch import multiprocessors

SOURCE = Path(__file__).with_suffix(".cu")
TARGET = "sm_90a"
ACROSS, DEPTH = 16, 96  # pixels of a patch in a row, channels of a step
THREADS = 384
STAGES = 3
Operands = nvrtc.operands(
    maps="before_map before_more_map x_map x_more_map after_map after_more_map w_map w_more_map",
    pointers="bias residual y",
    integers="apart batch frames height width channels columns taps_t taps_h taps_w "
    "residual_b residual_t residual_h residual_w",
)


def shared_bytes(columns: int) -> int:
    """Of a program whose tiles have so many output channels; see hopper.cu's Shared."""
    pixels = 128 * 192 // columns
    return 1024 + STAGES * (2 * DEPTH * (pixels + columns) + 16)


def frames_conv(
    parts: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """`frames_conv` of what is not `left_to_cudnn`, in one part or three."""
    batch, _, height, width, channels = parts[0].shape
    taps_t, taps_h, taps_w, out_channels, _ = weight.shape
    frames = sum(part.shape[1] for part in parts) - taps_t + 1
    y = parts[0].new_empty(batch, frames, height, width, out_channels)
    columns = 96 if out_channels % 192 else 192
    rows = 8 * 192 // columns
    apart = taps_t - 1 if len(parts) > 1 else 0
    before, x, after = parts if apart else parts * 3
    x = x if x.shape[1] else before  # no map of nothing
    taps = weight.flatten(0, 3)
    operands = Operands(
        *(nvrtc.tensor_map(part.flatten(0, 1), (1, rows, ACROSS, depth))
          for part in (before, x, after) for depth in (64, 32)),
        nvrtc.tensor_map(taps, (columns, 64)), nvrtc.tensor_map(taps, (columns, 32)),
        *map(nvrtc.address, (bias, residual, y)),
        apart, batch, frames, height, width, channels, out_channels, taps_t, taps_h, taps_w,
        *((0, 0, 0, 0) if residual is None else residual.stride()[:4]),
    )  # fmt: skip
    patches = batch * -(-height // rows) * -(-width // ACROSS)
    tiles = patches * frames * out_channels // columns
    kernel = nvrtc.load(
        SOURCE, "frames_conv", TARGET, shared_bytes(columns), Operands, y.get_device(),
        COLUMNS=columns, BF16=int(y.dtype == torch.bfloat16),
    )  # fmt: skip
    kernel.launch(min(tiles, multiprocessors(y.device)), THREADS, operands)
    return y
