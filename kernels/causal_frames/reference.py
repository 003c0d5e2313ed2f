"""Frames between causal convolutions in plain torch: the definition, and the CPU path."""

import torch
from torch import Tensor
from torch.nn import functional


def causal_frames(
    y: Tensor,
    cache: Tensor,
    gamma: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    keep: bool,
) -> Tensor:
    x, after = frames_apart(y, cache, gamma, bias, residual, keep)
    out = torch.cat([cache[:, : y.shape[1]], x, after], dim=1)
    cache.copy_(after)
    return out


def frames_apart(
    y: Tensor,
    cache: Tensor,
    gamma: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    x = _finished(y, bias, residual)
    if keep and x is not y:
        y.copy_(x)
    out = torch.cat([cache, x if gamma is None else norm_silu(x, gamma)], dim=1)
    before, frames = cache.shape[1], y.shape[1]
    return out[:, before : max(before, frames)].contiguous(), out[:, frames:].contiguous()


def norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(smallest(x.dtype))
    return functional.silu(x / length * x.shape[-1] ** 0.5 * gamma)


def smallest(dtype: torch.dtype) -> float:
    """The least |x| to divide by: torch's own 1e-12, where the dtype has it."""
    numbers = torch.finfo(dtype)
    return max(1e-12, numbers.tiny * numbers.eps)


def resample_frames(
    y: Tensor, bias: Tensor | None, residual: Tensor | None, split: int, scale: int, corner: int
) -> Tensor:
    x = _finished(y, bias, residual)
    if split > 1:
        x = x.unflatten(-1, (split, -1)).movedim(-2, 2).flatten(1, 2)
    if scale > 1:
        x = x.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    return functional.pad(x, (0, 0, 0, corner, 0, corner)).contiguous()


def _finished(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    x = y if bias is None else y + bias
    return x if residual is None else x + residual
