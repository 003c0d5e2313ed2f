"""INT8 linear layer in plain torch: the definition, and the CPU path."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import BLOCK


def linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> Tensor:
    scaled_product = _by_blocks if x_scale.ndim == 3 else _by_rows
    y = scaled_product(x_q, x_scale, w_q, w_scale)  # fp32 [B, L, N]
    if bias is not None:
        y = y + bias.float()
    if gate is not None:
        y = y * gate.float()
    if residual is not None:
        y = y + residual.float()
    return out.copy_(y)


def linear_and_squares(*operands: Tensor | None) -> tuple[Tensor, Tensor]:
    """`linear`, and the sums of its rows' squares by BLOCK columns, float32 [B, P, L]."""
    out = linear(*operands)
    parts = [columns.float().square().sum(-1) for columns in out.split(BLOCK, -1)]
    return out, torch.stack(parts, 1)


def _by_blocks(x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    length, n = x_q.shape[1], w_q.shape[0]
    x_scale = x_scale.repeat_interleave(BLOCK, 1)[:, :length]  # [B, L, K blocks]
    w_scale = w_scale.repeat_interleave(BLOCK, 0)[:n]  # [N, K blocks]
    y = x_scale.new_zeros(*x_q.shape[:2], n)
    for k, products in enumerate(_products(x_q, w_q)):
        y += products * x_scale[..., k, None] * w_scale[:, k]
    return y


def _by_rows(x_q: Tensor, x_scale: Tensor, w_q: Tensor, w_scale: Tensor) -> Tensor:
    total = sum(products.int() for products in _products(x_q, w_q))
    return total.float() * x_scale[..., None] * w_scale


def _products(x_q: Tensor, w_q: Tensor) -> Iterator[Tensor]:
    """x_q @ w_q.T for each block of K: at most 2^21, so exact in fp32 on any device."""
    for x_block, w_block in zip(x_q.split(BLOCK, -1), w_q.split(BLOCK, -1), strict=True):
        yield x_block.float() @ w_block.float().mT
