"""Block-sparse attention in plain torch, one head at a time and never L x L."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange

LOG2_E = math.log2(math.e)
SCORES = 2**25  # scores at a time, 128 MB
WEIGHT_SCALE = {torch.float8_e4m3fn: 256.0, torch.float16: 1.0}  # lifts the weights in e4m3
VALUE_LIMIT = 448.0  # the largest e4m3; float16 takes it too


class Int8Blocks(NamedTuple):
    """q or k [B, L, H, D] in int8, one scale per block of rows."""

    integers: torch.Tensor  # int8 [B, H, N * block, D], zeros beyond L
    scale: torch.Tensor  # float32 [B, H, N]


class Quantized(NamedTuple):
    """Low-bit operands: q carries softmax scale and log2(e) in its scale."""

    q: torch.Tensor  # int8 [B, H, NQ * block_q, D], zeros beyond L
    q_scale: torch.Tensor  # float32 [B, H, NQ]
    k: torch.Tensor  # int8 [B, H, NK * block_k, D], zeros beyond L
    k_scale: torch.Tensor  # float32 [B, H, NK]
    v: torch.Tensor  # e4m3 or float16 [B, H, NK, D, block_k], zeros beyond L
    v_scale: torch.Tensor  # float32 [B, H, D]


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int,
    block_k: int,
    out: torch.Tensor,
    add: bool,
) -> torch.Tensor:
    """Softmax attention over the selected key blocks, written or added to `out` [B, L, H, D]."""

    def head(b, h):
        queries = into_blocks(q[b, :, h], block_q) * score_scale(q)
        keys, values = into_blocks(k[b, :, h], block_k), into_blocks(v[b, :, h], block_k)
        return attend(queries, keys, values, block_map[b, h], q.shape[1])

    return over_heads(head, out, add)


def sage_attention(
    operands: Quantized, block_map: torch.Tensor, out: torch.Tensor, add: bool
) -> torch.Tensor:
    """The same on quantized operands, of blocks as long as those operands have them."""
    weight_scale, dtype = WEIGHT_SCALE[operands.v.dtype], operands.v.dtype

    def head(b, h):
        one = Quantized(*(x[b, h] for x in operands))
        queries = one.q.float().unflatten(0, (len(one.q_scale), -1)) * one.q_scale[:, None, None]
        keys = one.k.float().unflatten(0, (len(one.k_scale), -1)) * one.k_scale[:, None, None]
        values = one.v.float().mT * one.v_scale
        return attend(
            queries, keys, values, block_map[b, h], out.shape[1],
            lambda weights: (weights * weight_scale).to(dtype).float() / weight_scale,
        )  # fmt: skip

    return over_heads(head, out, add)


def score_scale(q: torch.Tensor) -> float:
    """What q k^T is multiplied with: 1 / sqrt(D), and log2(e), as weights are powers of two."""
    return q.shape[-1] ** -0.5 * LOG2_E


def over_heads(
    head: Callable[[int, int], torch.Tensor], out: torch.Tensor, add: bool
) -> torch.Tensor:
    """Gather head(b, h) [L, D] into `out` [B, L, H, D], or on top of what it holds."""
    for b in range(out.shape[0]):
        for h in range(out.shape[2]):
            out[b, :, h] = out[b, :, h] + head(b, h) if add else head(b, h)
    return out


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    length: int,
    round_weights: Callable[[torch.Tensor], torch.Tensor] = lambda weights: weights,
) -> torch.Tensor:
    """Attention of one head [L, D], float32, from q, k, v in blocks [N, block, D].

    Scores count in powers of two. Weights are rounded relative to the largest score of the blocks
    so far, as a kernel that goes through them in order does: the largest weight stays exact.
    """
    (_, block_q, _), (_, block_k, _) = q.shape, k.shape
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    step = max(1, SCORES // (block_q * block_k * block_map.shape[-1]))
    offset = torch.arange(block_k, device=q.device)
    for first in range(0, q.shape[0], step):
        chunk = slice(first, first + step)
        index = block_map[chunk].long()  # [N, count]
        key = (index[:, :, None] * block_k + offset)[:, None]  # [N, 1, count, block_k]
        scores = q[chunk] @ rearrange(k[index], "n count key d -> n d (count key)")
        scores = rearrange(scores, "n query (count key) -> n query count key", key=block_k)
        scores.masked_fill_(key >= length, -torch.inf)  # [N, block_q, count, block_k]
        highest = scores.amax(-1, keepdim=True).cummax(2).values
        weights, rescale = (scores - highest).exp2(), (highest - highest[:, :, -1:]).exp2()
        total = (weights * rescale).sum((-2, -1))[..., None]  # [N, block_q, 1]
        rounded = (round_weights(weights) * rescale).flatten(-2)
        out[chunk] = rounded @ rearrange(v[index], "n count key d -> n (count key) d") / total
    return out.flatten(0, 1)[:length]


def into_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """[L, D] as float32 [ceil(L / block), block, D], filled up with zeros."""
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[0] % block))
    return rearrange(padded, "(n row) d -> n row d", row=block)


def quantize(
    q: torch.Tensor | Int8Blocks,
    k: torch.Tensor,
    v: torch.Tensor,
    k_mean: torch.Tensor,
    v_dtype: torch.dtype,
    block_q: int,
    block_k: int,
    v_max: torch.Tensor | None = None,
) -> Quantized:
    """q and k - k_mean in int8 with a scale per block, v with a scale per channel."""
    q_int, q_scale = q if isinstance(q, Int8Blocks) else quantize_heads(q, block_q)
    keys = quantize_keys(k, block_k, k_mean)
    values = quantize_values(v, v_dtype, block_k, v_max)
    return Quantized(q_int, q_scale * score_scale(k), *keys, *values)


def quantize_keys(k: torch.Tensor, block: int, k_mean: torch.Tensor) -> Int8Blocks:
    """k - k_mean in int8 with a scale per block."""
    return quantize_heads(k.float() - k_mean[:, None], block)


def quantize_heads(x: torch.Tensor, block: int) -> Int8Blocks:
    """x [B, L, H, D] in int8, in blocks of rows of one head."""
    rows = x.float().transpose(1, 2)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -x.shape[1] % block))
    blocks = rearrange(padded, "b h (n row) d -> b h n row d", row=block)
    amax = blocks.abs().amax((-2, -1)).clamp_min(1e-8)
    # Not 127 / amax: torch computes that as 127 times the reciprocal, rounded twice.
    factor = torch.full_like(amax, 127) / amax
    integers = (blocks * factor[..., None, None]).round().clamp(-127, 127)
    return Int8Blocks(integers.to(torch.int8).contiguous().flatten(2, 3), amax / 127)


def quantize_values(
    v: torch.Tensor,
    dtype: torch.dtype,
    block: int,
    v_max: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L, H, D] to `dtype` [B, H, N, D, block], to `out` if there is one, and float32 [B, H, D],
    a scale per channel."""
    amax = v.float().abs().amax(1) if v_max is None else v_max  # [B, H, D]
    amax = amax.clamp_min(1e-8)
    scaled = (v.float() * (VALUE_LIMIT / amax)[:, None]).clamp(-VALUE_LIMIT, VALUE_LIMIT)
    padded = torch.nn.functional.pad(scaled, (0, 0, 0, 0, 0, -v.shape[1] % block))
    columns = rearrange(padded, "b (n row) h d -> b h n d row", row=block)
    values = columns.contiguous().to(dtype)
    return values if out is None else out.copy_(values), amax / VALUE_LIMIT
