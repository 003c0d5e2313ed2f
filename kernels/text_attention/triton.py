"""Attention to a text in Triton: some queries of a head meet all of its keys, a few at a time."""

import math

import torch
import triton
import triton.language as tl

from ..dispatch import capability
from ..launching import launched
from ..tuning import TEXT_KEYS, of_card

LOG2_E = math.log2(math.e)
ROWS = 64  # queries of one program
LAUNCH = {"num_warps": 4, "num_stages": 2}  # the same on every card


@launched
@triton.jit(do_not_specialize=["length", "heads", "keys"])
def text_attention_kernel(
    q_ptr, k_ptr, v_ptr, weight_ptr, norms_ptr, out_ptr, length, heads, keys, last_bias, scale,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # All heads of some rows run side by side: together they read whole rows.
    head = tl.program_id(0).to(tl.int64)
    sample, head = head // heads, head % heads
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < length
    channel = tl.arange(0, HEAD_DIM)
    wide = row.to(tl.int64)[:, None]
    q_ptr += sample * stride_qb + head * stride_qh
    q = tl.load(q_ptr + wide * stride_ql + channel[None, :], mask=inside[:, None], other=0.0)
    if norms_ptr is not None:
        norm = tl.load(norms_ptr + sample * length + row, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + head * HEAD_DIM + channel).to(tl.float32)
        q = (q.to(tl.float32) * norm[:, None] * weight[None, :]).to(q.dtype)
    k_ptr += sample * stride_kb + head * stride_kh
    v_ptr += sample * stride_vb + head * stride_vh
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for first in range(0, keys, KEYS):
        key = first + tl.arange(0, KEYS)
        there = (key < keys)[:, None]
        k = tl.load(k_ptr + key[:, None] * stride_kt + channel[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + key[:, None] * stride_vt + channel[None, :], mask=there, other=0.0)
        bias = tl.where(key == keys - 1, last_bias, tl.where(key < keys, 0.0, float("-inf")))
        scores = tl.dot(q, tl.trans(k)) * scale + bias[None, :]  # [ROWS, KEYS], to base 2
        higher = tl.maximum(row_max, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        factor = tl.exp2(row_max - higher)
        row_sum = row_sum * factor + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * factor[:, None])
        row_max = higher
    place = ((sample * length + wide) * heads + head) * HEAD_DIM + channel[None, :]
    y = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, y, mask=inside[:, None])


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
    batch, length, heads, dim = q.shape
    if row_norms is not None:
        weight, row_norms = weight.contiguous(), row_norms.contiguous()
    text_attention_kernel[batch * heads, -(-length // ROWS)](
        q, k, v, weight, row_norms, out, length, heads, k.shape[1],
        math.log2(repeats), LOG2_E * dim**-0.5,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        HEAD_DIM=dim, ROWS=ROWS, KEYS=of_card(TEXT_KEYS, capability(q.device)), **LAUNCH,
    )  # fmt: skip
    return out
