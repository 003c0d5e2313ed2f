"""The linear branch in Triton."""

import torch
import triton
import triton.language as tl

from ..dispatch import launching_on
from ..int8_quant.triton import larger, largest

TILE = 16  # keys of one step of the state: two programs fit a multiprocessor's registers
PROGRAMS = 528  # of the state, over all heads: 2 waves of 2 on a card of 132 multiprocessors
ROWS = 128  # queries of one program
STATE_LAUNCH = {"num_warps": 8, "num_stages": 3}  # both the same on every card
LAUNCH = {"num_warps": 8, "num_stages": 2}


@triton.jit
def apply_feature_map(x, FEATURE_MAP: tl.constexpr):
    """phi of float32 rows [R, D]."""
    if FEATURE_MAP == "softmax":
        weights = tl.exp2((x - tl.max(x, 1)[:, None]) * 1.4426950408889634)
        phi = weights / tl.sum(weights, 1)[:, None]
    elif FEATURE_MAP == "elu":
        phi = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    else:
        phi = tl.maximum(x, 0.0)
    return phi


@triton.jit
def linear_rows(tile, mix, normalizer, bias, FEATURE_MAP: tl.constexpr):
    """The linear branch of queries [R, D] of one head, float32 [R, D]; normalizer and bias [D].

    Each query takes a weighted mean of the rows of mix [D, D], see `project_state`.
    """
    weights = apply_feature_map(tile.to(tl.float32), FEATURE_MAP) * normalizer[None, :]
    weights = weights / (1e-5 + tl.sum(weights, 1))[:, None]
    return tl.dot(weights.to(mix.dtype), mix) + bias.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["heads", "length", "rows"])
def key_value_state_kernel(
    k, v, state, normalizer, maxima, k_b, k_l, k_h, v_b, v_l, v_h, heads, length, rows,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, FEATURE_MAP: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    k += head // heads * k_b + head % heads * k_h
    v += head // heads * v_b + head % heads * v_h
    channel = tl.arange(0, HEAD_DIM)
    offset = tl.arange(0, TILE)[:, None]
    b_state = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    # Added up over the rows of a tile only at the end: each sum would wait for every warp.
    b_normalizer = tl.zeros((TILE, HEAD_DIM), tl.float32)
    b_maxima = tl.zeros((TILE, HEAD_DIM), tl.float32)
    end = tl.minimum((split + 1) * rows, length)
    for first in range(split * rows, end, TILE):
        inside = offset < end - first
        p_k = k + tl.cast(first, tl.int64) * k_l
        p_v = v + tl.cast(first, tl.int64) * v_l
        keys = tl.load(p_k + (offset * k_l + channel[None, :]), mask=inside, other=0.0)  # [TILE, D]
        values = tl.load(p_v + (offset * v_l + channel[None, :]), mask=inside, other=0.0)
        phi = tl.where(inside, apply_feature_map(keys.to(tl.float32), FEATURE_MAP), 0.0)
        b_normalizer += phi
        if MAXIMA:
            b_maxima = larger(b_maxima, tl.abs(values.to(tl.float32)))
        b_state = tl.dot(tl.trans(phi.to(values.dtype)), values, b_state)  # [D, D]
    part = split * tl.num_programs(1).to(tl.int64) + head
    place = channel[:, None] * HEAD_DIM + channel[None, :]
    tl.store(state + part * (HEAD_DIM * HEAD_DIM) + place, b_state)
    tl.store(normalizer + part * HEAD_DIM + channel, tl.sum(b_normalizer, 0))
    if MAXIMA:
        maximum = largest(b_maxima, 0)
        tl.store(maxima + part * HEAD_DIM + channel, maximum)


@triton.jit(do_not_specialize=["heads", "length"])
def apply_state_kernel(
    q, mix, normalizer, bias, out, q_b, q_l, q_h, heads, length,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    sample = head // heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    q += sample * q_b + head % heads * q_h
    channel = tl.arange(0, HEAD_DIM)
    offset = row.to(tl.int64) * q_l + channel[None, :]
    tile = tl.load(q + offset, mask=row < length, other=0.0)
    b_mix = tl.load(mix + (head * HEAD_DIM + channel[:, None]) * HEAD_DIM + channel[None, :])
    z = tl.load(normalizer + head * HEAD_DIM + channel)
    rows = linear_rows(tile, b_mix, z, tl.load(bias + channel), FEATURE_MAP)
    place = ((sample * length + row) * heads + head % heads) * HEAD_DIM
    tl.store(out + place + channel[None, :], rows.to(out.dtype.element_ty), mask=row < length)


def project_state(
    state: torch.Tensor, normalizer: torch.Tensor, proj_weight: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """state W^T with each row divided by its channel's normalizer, as `dtype` [B, H, D, D].

    Its rows are weighted means of projected values, so they fit every dtype that the values fit;
    the sums over all keys would overflow float16.
    """
    return (state @ proj_weight.float().T / normalizer.clamp_min(1e-30)[..., None]).to(dtype)


def key_value_state(
    k: torch.Tensor, v: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over keys: state float32 [B, H, D, D] and normalizer float32 [B, H, D]."""
    return _sum_over_keys(k, v, feature_map, maxima=False)[:2]


def key_value_state_and_maximum(
    k: torch.Tensor, v: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, and max |v| over the keys, float32 [B, H, D], from the same reading of v."""
    return _sum_over_keys(k, v, feature_map, maxima=True)


def _sum_over_keys(k, v, feature_map, maxima: bool):
    batch, length, heads, dim = k.shape
    # By the shape alone, so that sums never change order.
    rows = TILE * triton.cdiv(length, TILE * max(1, PROGRAMS // (batch * heads)))
    splits = triton.cdiv(length, rows)
    options = {"dtype": torch.float32, "device": k.device}
    state = torch.empty(splits, batch, heads, dim, dim, **options)
    normalizer = torch.empty(splits, batch, heads, dim, **options)
    maximum = torch.empty(splits, batch, heads, dim, **options) if maxima else normalizer
    with launching_on(k):
        key_value_state_kernel[splits, batch * heads](
            k, v, state, normalizer, maximum, *k.stride()[:3], *v.stride()[:3],
            heads, length, rows,
            HEAD_DIM=dim, TILE=TILE, FEATURE_MAP=feature_map, MAXIMA=maxima,
            **STATE_LAUNCH,
        )  # fmt: skip
    return state.sum(0), normalizer.sum(0), maximum.amax(0) if maxima else None


def linear_attention(
    q: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    feature_map: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The linear branch of [B, L, H, D], in q's dtype; `out`, contiguous, may be q itself."""
    batch, length, heads, dim = q.shape
    mix = project_state(state, normalizer, proj_weight, q.dtype)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    with launching_on(q):
        apply_state_kernel[triton.cdiv(length, ROWS), batch * heads](
            q, mix, normalizer.contiguous(), proj_bias.contiguous(), out,
            *q.stride()[:3], heads, length,
            HEAD_DIM=dim, ROWS=ROWS, FEATURE_MAP=feature_map, **LAUNCH,
        )  # fmt: skip
    return out
