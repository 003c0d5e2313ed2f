"""Attention to a text in Triton: queries of a head meet all of its keys.

Those of a short text stay in a program, which takes one tile of queries after another; of a longer
one they come a few at a time for each tile.
"""

import math

import torch
import triton
import triton.language as tl

from ..dispatch import capability, multiprocessors
from ..launching import launched
from ..tuning import SHORT_TEXT_WARPS, TEXT_KEYS, of_card

LOG2_E = math.log2(math.e)
ROWS = 64  # queries of a tile
SHORT = 128  # keys that a program keeps, at most
PROGRAMS = 2  # that share a multiprocessor and keep keys
# The same on every card. Programs that keep keys read the next queries meanwhile.
LAUNCH = {"num_warps": 4, "num_stages": 2}
SHORT_LAUNCH = {"STAGES": 2, "num_stages": 1}


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


@launched
@triton.jit(do_not_specialize=["length", "heads", "keys"])
def short_text_attention_kernel(
    q_ptr, k_ptr, v_ptr, weight_ptr, norms_ptr, out_ptr, length, heads, keys, last_bias, scale,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kt, stride_kh,
    stride_vb, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    sample, head = head // heads, head % heads
    channel, key = tl.arange(0, HEAD_DIM), tl.arange(0, KEYS)
    there = (key < keys)[:, None]
    k_ptr += sample * stride_kb + head * stride_kh
    v_ptr += sample * stride_vb + head * stride_vh
    k = tl.load(k_ptr + key[:, None] * stride_kt + channel[None, :], mask=there, other=0.0)
    v = tl.load(v_ptr + key[:, None] * stride_vt + channel[None, :], mask=there, other=0.0)
    bias = tl.where(key == keys - 1, last_bias, tl.where(key < keys, 0.0, float("-inf")))
    if norms_ptr is not None:
        weight = tl.load(weight_ptr + head * HEAD_DIM + channel).to(tl.float32)
    q_ptr += sample * stride_qb + head * stride_qh
    out_ptr += (sample * length * heads + head) * HEAD_DIM
    tiles = tl.cdiv(length, ROWS)
    for tile in tl.range(tl.program_id(1), tiles, tl.num_programs(1), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)
        inside = row < length
        wide = row.to(tl.int64)[:, None]
        q = tl.load(q_ptr + wide * stride_ql + channel[None, :], mask=inside[:, None], other=0.0)
        if norms_ptr is not None:
            norm = tl.load(norms_ptr + sample * length + row, mask=inside, other=0.0)
            q = (q.to(tl.float32) * norm[:, None] * weight[None, :]).to(q.dtype)
        scores = tl.dot(q, tl.trans(k)) * scale + bias[None, :]  # [ROWS, KEYS], to base 2
        weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
        y = tl.dot(weights.to(v.dtype), v) / tl.sum(weights, 1)[:, None]
        place = wide * (heads * HEAD_DIM) + channel[None, :]
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside[:, None])


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
    tiles, keys = -(-length // ROWS), k.shape[1]
    arguments = (
        q, k, v, weight, row_norms, out, length, heads, keys,
        math.log2(repeats), LOG2_E * dim**-0.5,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
    )  # fmt: skip
    card = capability(q.device)
    if keys <= SHORT:
        warps = of_card(SHORT_TEXT_WARPS, card)
        programs = max(1, min(tiles, PROGRAMS * multiprocessors(q.device) // (batch * heads)))
        short_text_attention_kernel[batch * heads, programs](
            *arguments, HEAD_DIM=dim, ROWS=ROWS, KEYS=SHORT, num_warps=warps, **SHORT_LAUNCH
        )
    else:
        step = of_card(TEXT_KEYS, card)
        text_attention_kernel[batch * heads, tiles](
            *arguments, HEAD_DIM=dim, ROWS=ROWS, KEYS=step, **LAUNCH
        )
    return out
