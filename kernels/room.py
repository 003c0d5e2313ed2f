"""Memory that serves again."""

import math

import torch

from .checks import BLOCK


def in_whole_blocks(
    batch: int, length: int, channels: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An empty contiguous [B, L, C], in as much memory as whole blocks of rows take.

    int8 of heads is padded to such blocks: so whichever comes next fits where the other one was.
    """
    rows = -(-length // BLOCK) * BLOCK
    room = torch.empty(batch * rows * channels, dtype=dtype, device=device)
    shape = batch, length, channels
    return room[: math.prod(shape)].view(shape)
