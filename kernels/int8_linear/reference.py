"""INT8 linear layer in plain torch: the definition, and the CPU path."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 128


def linear_blocks(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    length, n = x_q.shape[1], w_q.shape[0]
    x_scale = x_scale.repeat_interleave(BLOCK, 1)[:, :length]  # [B, L, K blocks]
    w_scale = w_scale.repeat_interleave(BLOCK, 0)[:n]  # [N, K blocks]
    y = x_scale.new_zeros(*x_q.shape[:2], n)
    for k, products in enumerate(_products(x_q, w_q)):
        y += products * x_scale[..., k, None] * w_scale[:, k]
    return _finish(y, bias, out_dtype)


def linear_rows(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    total = sum(products.int() for products in _products(x_q, w_q))
    return _finish(total.float() * x_scale[..., None] * w_scale, bias, out_dtype)


def _products(x_q: Tensor, w_q: Tensor) -> Iterator[Tensor]:
    """x_q @ w_q.T for each block of K: at most 2^21, so exact in fp32 on any device."""
    for x_block, w_block in zip(x_q.split(BLOCK, -1), w_q.split(BLOCK, -1), strict=True):
        yield x_block.float() @ w_block.float().mT


def _finish(y: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return (y if bias is None else y + bias.float()).to(out_dtype)
