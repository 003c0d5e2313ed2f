"""Attention to a text in plain torch."""

import math

import torch


def text_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    repeats: int,
    weight: torch.Tensor | None,
    row_norms: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """See the op."""
    if row_norms is not None:
        normed = q.float() * row_norms[..., None, None] * weight.float().view(q.shape[2:])
        q = normed.to(q.dtype)
    # Not in 16 bits: the logarithm would be off by up to a 64th.
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    bias = q.new_zeros(1, k.shape[1])
    bias[:, -1] = math.log(repeats)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=bias)
    return out.copy_(y.transpose(1, 2))
