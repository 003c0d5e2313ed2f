"""Convolutions of frames in plain torch: the definition."""

import torch
from torch import Tensor
from torch.nn import functional


def frames_conv(
    parts: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    sides = weight.shape[1] // 2, weight.shape[2] // 2
    taps = weight.permute(3, 4, 0, 1, 2)
    x = torch.cat(parts, dim=1).movedim(-1, 1)
    y = functional.conv3d(x, taps, padding=(0, *sides)).movedim(1, -1)
    y = y if bias is None else y + bias
    y = y if residual is None else y + residual
    return y.contiguous()
