"""What prepares q and k in plain torch: a composition of the ops around it."""

from typing import NamedTuple

import torch

from ..block_map.reference import block_means
from ..linear_attention import LinearBranch
from ..linear_attention.reference import linear_attention
from ..norm.reference import rms_norm
from ..rope.reference import apply_rope
from ..sparse_attention.reference import quantize_blocks


class Prepared(NamedTuple):
    """A normalized and rotated q or k, and what is known of its blocks."""

    x: torch.Tensor  # [B, L, H, D], or its linear branch
    means: torch.Tensor  # float32 [B, H, N, D]
    q: torch.Tensor | None  # int8 [B, H, N * block, D], zeros beyond L
    scale: torch.Tensor | None  # float32 [B, H, N]


def prepare(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    block: int,
    quantize: bool,
    out: torch.Tensor,
    linear: LinearBranch | None,
) -> Prepared:
    """RMSNorm over all heads, RoPE, block means, int8 blocks and the linear branch."""
    normalized = rms_norm(x.flatten(2), weight, eps).view(x.shape)
    rotated = apply_rope(normalized, cos, sin)
    integers = quantize_blocks(rotated, block) if quantize else (None, None)
    means = block_means(rotated, block)
    out.copy_(rotated if linear is None else linear_attention(rotated, *linear))
    return Prepared(out, means, *integers)
