"""What prepares q and k in plain torch: a composition of the ops around it."""

import torch

from ..block_map.reference import block_means
from ..linear_attention import LinearBranch
from ..linear_attention.reference import linear_attention
from ..norm.reference import rms_norm
from ..rope.reference import apply_rope
from ..sparse_attention.reference import quantize_heads


def prepare(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    block: int,
    quantize: bool,
    out: torch.Tensor,
    branch: LinearBranch | None,
    squares: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The rotated rows or their linear branch to `out`; their means, int8 blocks and scales."""
    if squares is None:
        normalized = rms_norm(x.flatten(2), weight, eps).view(x.shape)
    else:
        mean_square = squares.sum(1)[..., None, None] / weight.numel()  # [B, L, 1, 1]
        weight = weight.float().view(x.shape[2:])
        normalized = (x.float() * (mean_square + eps).rsqrt() * weight).to(x.dtype)
    rotated = apply_rope(normalized, cos, sin)
    out.copy_(rotated if branch is None else linear_attention(rotated, *branch))
    integers, scales = quantize_heads(rotated, block) if quantize else (None, None)
    return block_means(rotated, block), integers, scales
