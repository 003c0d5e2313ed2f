"""The linear branch in Triton."""

import torch
import triton
import triton.language as tl

from ..dispatch import multiprocessors
from ..int8_quant.triton import larger, largest
from ..launching import launched

TILE = 16  # keys of one step of the state: two programs fit a multiprocessor's registers
PROGRAMS = 4  # of the state, over all heads, for each multiprocessor: 2 waves of 2
ROWS = 128  # queries of one program
STATE_ROWS = 64  # of the state, that a program projects
SMALLEST = 1e-30  # to divide by: float32 stays finite
SUMS = 8  # columns of the normalizer beside a projected state: as narrow as a product may be
# A normalizer is at most this, scaled: sums over any number of keys fit float16.
MEAN = 128.0
STATE_LAUNCH = {"num_warps": 8, "num_stages": 3}  # both the same on every card
LAUNCH = {"num_warps": 8, "num_stages": 2}
PROJECT_LAUNCH = {"num_warps": 8, "num_stages": 1}  # with 4 some cards spill


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
def linear_rows(q, mix, normalizer, bias, FEATURE_MAP: tl.constexpr):
    """The linear branch of queries [R, D] of one head, float32 [R, D]; normalizer and bias [D].

    Each query takes a weighted mean of the rows of mix [D, D], see `project_state`.
    """
    weights = apply_feature_map(q.to(tl.float32), FEATURE_MAP) * normalizer[None, :]
    weights = weights / (1e-5 + tl.sum(weights, 1))[:, None]
    return tl.dot(weights.to(mix.dtype), mix) + bias.to(tl.float32)[None, :]


@launched
@triton.jit(do_not_specialize=["length", "heads", "rows"])
def key_value_state_kernel(
    k_ptr, v_ptr, state_ptr, normalizer_ptr, maxima_ptr, length, heads, rows,
    stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, FEATURE_MAP: tl.constexpr, MAXIMA: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    k_ptr += head // heads * stride_kb + head % heads * stride_kh
    v_ptr += head // heads * stride_vb + head % heads * stride_vh
    channel = tl.arange(0, HEAD_DIM)
    offset = tl.arange(0, TILE)[:, None]
    state = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    # Added up over the rows of a tile only at the end: each sum would wait for every warp.
    normalizer = tl.zeros((TILE, HEAD_DIM), tl.float32)
    maxima = tl.zeros((TILE, HEAD_DIM), tl.float32)
    end = tl.minimum((split + 1) * rows, length)
    for first in range(split * rows, end, TILE):
        inside = offset < end - first
        p_k = k_ptr + tl.cast(first, tl.int64) * stride_kl
        p_v = v_ptr + tl.cast(first, tl.int64) * stride_vl
        # [TILE, D] both.
        k = tl.load(p_k + (offset * stride_kl + channel[None, :]), mask=inside, other=0.0)
        v = tl.load(p_v + (offset * stride_vl + channel[None, :]), mask=inside, other=0.0)
        phi = tl.where(inside, apply_feature_map(k.to(tl.float32), FEATURE_MAP), 0.0)
        normalizer += phi
        if MAXIMA:
            maxima = larger(maxima, tl.abs(v.to(tl.float32)))
        state = tl.dot(tl.trans(phi.to(v.dtype)), v, state)  # [D, D]
    part = split * tl.num_programs(1).to(tl.int64) + head
    place = channel[:, None] * HEAD_DIM + channel[None, :]
    tl.store(state_ptr + part * (HEAD_DIM * HEAD_DIM) + place, state)
    tl.store(normalizer_ptr + part * HEAD_DIM + channel, tl.sum(normalizer, 0))
    if MAXIMA:
        maximum = largest(maxima, 0)
        tl.store(maxima_ptr + part * HEAD_DIM + channel, maximum)


@launched
@triton.jit(do_not_specialize=["length", "heads"])
def apply_state_kernel(
    q_ptr, mix_ptr, normalizer_ptr, bias_ptr, out_ptr, length, heads,
    stride_qb, stride_ql, stride_qh,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    sample = head // heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    q_ptr += sample * stride_qb + head % heads * stride_qh
    channel = tl.arange(0, HEAD_DIM)
    offset = row.to(tl.int64) * stride_ql + channel[None, :]
    q = tl.load(q_ptr + offset, mask=row < length, other=0.0)  # [ROWS, D]
    row_of_mix = (head * HEAD_DIM + channel[:, None]) * HEAD_DIM
    mix = tl.load(mix_ptr + row_of_mix + channel[None, :])  # [D, D]
    normalizer = tl.load(normalizer_ptr + head * HEAD_DIM + channel)  # [D]
    bias = tl.load(bias_ptr + channel)  # [D]
    rows = linear_rows(q, mix, normalizer, bias, FEATURE_MAP)  # [ROWS, D]
    place = ((sample * length + row) * heads + head % heads) * HEAD_DIM
    rows = rows.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place + channel[None, :], rows, mask=row < length)


@launched
@triton.jit
def project_state_kernel(
    state_ptr, normalizer_ptr, weight_ptr, places_ptr, mix_ptr, scale,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, SMALLEST: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    out = tl.arange(0, HEAD_DIM)
    state_ptr += head * (HEAD_DIM * HEAD_DIM) + row * HEAD_DIM
    mix_ptr += head * (HEAD_DIM * (HEAD_DIM + SUMS))
    mix = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for first in range(0, HEAD_DIM, 32):
        channel = first + tl.arange(0, 32)[None, :]
        state = tl.load(state_ptr + channel)  # [ROWS, 32]
        weight = tl.load(weight_ptr + out[:, None] * HEAD_DIM + channel)  # [D, 32]
        mix = tl.dot(state, tl.trans(weight.to(tl.float32)), mix, input_precision="tf32x3")
    normalizer = tl.load(normalizer_ptr + head * HEAD_DIM + row)  # [ROWS, 1]
    place = row * HEAD_DIM + out[None, :]
    if places_ptr is not None:
        place = tl.load(places_ptr + place)
    if SUMS == 0:
        mix = mix / larger(normalizer, SMALLEST)
    else:
        mix *= scale
        total = (normalizer + 1e-5) * scale
        high = total.to(mix_ptr.dtype.element_ty)
        low = (total - high.to(tl.float32)).to(mix_ptr.dtype.element_ty)
        column = tl.arange(0, SUMS)[None, :]
        beside = tl.load(places_ptr + HEAD_DIM * HEAD_DIM + row * SUMS + column)
        tl.store(mix_ptr + beside, tl.where(column % 2 == 0, high, low))
    tl.store(mix_ptr + place, mix.to(mix_ptr.dtype.element_ty))


def project_state(
    state: torch.Tensor,
    normalizer: torch.Tensor,
    proj_weight: torch.Tensor,
    dtype: torch.dtype,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """state W^T with each row divided by its channel's normalizer, as `dtype` [B, H, D, D].

    Its rows are weighted means of projected values, so they fit every dtype that the values fit;
    the sums over all keys would overflow float16. One head as another, which cuBLAS does not
    promise of its products for more or fewer of them. With `places` int32 [D * D] the numbers of a
    head lie in another order: each at its place there.
    """
    batch, heads, dim, _ = state.shape
    mix = torch.empty_like(state, dtype=dtype, memory_format=torch.contiguous_format)
    project_state_kernel[dim // STATE_ROWS, batch * heads](
        state.contiguous(), normalizer.contiguous(), proj_weight.contiguous(), places, mix, None,
        HEAD_DIM=dim, ROWS=STATE_ROWS, SMALLEST=SMALLEST, SUMS=0, **PROJECT_LAUNCH,
    )  # fmt: skip
    return mix


def project_state_and_sums(
    state: torch.Tensor,
    normalizer: torch.Tensor,
    proj_weight: torch.Tensor,
    dtype: torch.dtype,
    places: torch.Tensor,
    length: int,
) -> torch.Tensor:
    """state W^T and beside it the normalizer plus 1e-5 in SUMS columns, as `dtype`
    [B, H, D * (D + SUMS)]: of e^q times both the quotient is the linear branch.

    Both are scaled, so that float16 holds sums over `length` keys. Even columns have what is left
    of the normalizer in `dtype`, odd ones the rest: two of them add up to it. `places` int32
    [D * (D + SUMS)]: where the state's numbers lie, then the columns'.
    """
    batch, heads, dim, _ = state.shape
    mix = torch.empty(batch, heads, dim * (dim + SUMS), dtype=dtype, device=state.device)
    project_state_kernel[dim // STATE_ROWS, batch * heads](
        state.contiguous(), normalizer.contiguous(), proj_weight.contiguous(), places, mix,
        MEAN / length, HEAD_DIM=dim, ROWS=STATE_ROWS, SMALLEST=SMALLEST, SUMS=SUMS,
        **PROJECT_LAUNCH,
    )  # fmt: skip
    return mix


def key_value_state(
    k: torch.Tensor, v: torch.Tensor, feature_map: str, of_heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over keys: state float32 [B, H, D, D] and normalizer float32 [B, H, D]."""
    return _sum_over_keys(k, v, feature_map, of_heads, maxima=False)[:2]


def key_value_state_and_maximum(
    k: torch.Tensor, v: torch.Tensor, feature_map: str, of_heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, and max |v| over the keys, float32 [B, H, D], from the same reading of v."""
    return _sum_over_keys(k, v, feature_map, of_heads, maxima=True)


def _sum_over_keys(k, v, feature_map, of_heads, maxima: bool):
    batch, length, heads, dim = k.shape
    rows, state, normalizer = room_for_sums(k, of_heads)
    maximum = torch.empty_like(normalizer) if maxima else normalizer
    key_value_state_kernel[state.shape[0], batch * heads](
        k, v, state, normalizer, maximum, length, heads, rows,
        *k.stride()[:3], *v.stride()[:3],
        HEAD_DIM=dim, TILE=TILE, FEATURE_MAP=feature_map, MAXIMA=maxima,
        **STATE_LAUNCH,
    )  # fmt: skip
    return state.sum(0), normalizer.sum(0), maximum.amax(0) if maxima else None


def room_for_sums(
    x: torch.Tensor, of_heads: int | None = None, tile: int = TILE
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The rows of x [B, L, H, D] that a program sums up, whole tiles, and room for the sums of all
    programs: float32 [splits, B, H, D, D] and [splits, B, H, D]. As many rows as if x had
    `of_heads`."""
    batch, length, heads, dim = x.shape
    # By shape and card alone, so that sums never change order.
    splits = max(1, PROGRAMS * multiprocessors(x.device) // (batch * (of_heads or heads)))
    rows = tile * -(-length // (tile * splits))
    options = {"dtype": torch.float32, "device": x.device}
    parts = -(-length // rows), batch, heads, dim
    return rows, torch.empty(*parts, dim, **options), torch.empty(*parts, **options)


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
    out = torch.empty(*q.shape, dtype=q.dtype, device=q.device) if out is None else out
    apply_state_kernel[-(-length // ROWS), batch * heads](
        q, mix, normalizer.contiguous(), proj_bias.contiguous(), out, length, heads,
        *q.stride()[:3],
        HEAD_DIM=dim, ROWS=ROWS, FEATURE_MAP=feature_map, **LAUNCH,
    )  # fmt: skip
    return out
