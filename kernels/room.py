"""Memory that serves again."""

import torch

from .checks import BLOCK

LARGE = 2**27  # bytes; of less it does not matter, and a view costs the CPU time


def in_whole_blocks(
    batch: int, length: int, channels: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An empty contiguous [B, L, C], where it is large in as much memory as whole blocks of rows.

    int8 of heads is padded to such blocks: so whichever comes next fits where the other one was.
    """
    size = batch * length * channels
    if size * dtype.itemsize < LARGE or length % BLOCK == 0:
        return torch.empty(batch, length, channels, dtype=dtype, device=device)
    rows = -(-length // BLOCK) * BLOCK
    room = torch.empty(batch * rows * channels, dtype=dtype, device=device)
    return room[:size].view(batch, length, channels)
