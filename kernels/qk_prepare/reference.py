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
    row_norms: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The rotated rows or their linear branch to `out`; their means, int8 blocks and scales."""
    normalized = _normalized(x, weight, eps, row_norms)
    rotated = apply_rope(normalized, cos, sin)
    out.copy_(rotated if branch is None else linear_attention(rotated, *branch))
    integers, scales = quantize_heads(rotated, block) if quantize else (None, None)
    return block_means(rotated, block), integers, scales


def square_sums(x: torch.Tensor) -> torch.Tensor:
    """Sums of squares of x [B, L, H, D] by head, float32 [B, L, H]."""
    return x.float().square().sum(-1)


def norms_of_squares(squares: torch.Tensor, channels: int, eps: float) -> torch.Tensor:
    """1 / root mean square of rows whose squares add up to squares [B, P, L], float32 [B, L]."""
    total = squares.double().sum(1).float()  # exact before it is rounded, in any order
    return torch.rsqrt(total / channels + eps)


def _normalized(
    x: torch.Tensor, weight: torch.Tensor, eps: float, row_norms: torch.Tensor | None
) -> torch.Tensor:
    """RMSNorm of x [B, L, H, D] over all heads, or by the norms that its rows are given."""
    if row_norms is None:
        return rms_norm(x.flatten(2), weight, eps).view(x.shape)
    weight = weight.float().view(x.shape[2:])
    return (x.float() * row_norms[..., None, None] * weight).to(x.dtype)
