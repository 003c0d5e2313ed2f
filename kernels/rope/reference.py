"""Rotary position embedding in plain torch: the definition, and the CPU path."""

import torch
from einops import rearrange
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = rearrange(x.float(), "b l h (d pair) -> pair b l h d", pair=2)
    cos, sin = cos[:, :, None], sin[:, :, None]
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    return rearrange(rotated, "b l h d pair -> b l h (d pair)").to(x.dtype)
