"""The gradients of the linear branch in Triton.

As in triton.py a channel's normalizer moves from the state to the queries' weights, which then are
at most 1, while rows of state W^T become weighted means: both fit float16, the sums do not.
"""

import torch
import triton
import triton.language as tl

from ..launching import launched
from .triton import (
    LAUNCH,
    SMALLEST,
    STATE_LAUNCH,
    TILE,
    apply_feature_map,
    project_state,
    room_for_sums,
)

ROWS = 64  # of one program that sums nothing: two tiles and their changes fill its registers
# A multiprocessor for each: ptxas would save registers for a second program, and spill.
SUMS_LAUNCH = {**STATE_LAUNCH, "maxnreg": 248}


@triton.jit
def through_feature_map(phi, change, FEATURE_MAP: tl.constexpr):
    """`change` [R, D] times the derivative of phi at the rows that it gave `phi`."""
    if FEATURE_MAP == "softmax":
        out = phi * (change - tl.sum(change * phi, 1)[:, None])
    elif FEATURE_MAP == "elu":
        out = change * tl.minimum(phi, 1.0)
    else:
        out = tl.where(phi > 0, change, 0.0)
    return out


@triton.jit
def load_rows(
    x_ptr, first, end, heads, stride_b, stride_l, stride_h,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """[ROWS, D] from row `first` on of this program's head of x [B, L, H, D], zeros from `end`."""
    head = tl.program_id(1).to(tl.int64)
    offset = tl.arange(0, ROWS)[:, None]
    x_ptr += (
        head // heads * stride_b + head % heads * stride_h + tl.cast(first, tl.int64) * stride_l
    )
    place = x_ptr + (offset * stride_l + tl.arange(0, HEAD_DIM)[None, :])
    return tl.load(place, mask=offset < end - first, other=0.0)


@triton.jit
def rows_of(x_ptr, first, end, length, heads, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers [ROWS, D] to the rows that `load_rows` takes, of a contiguous x, and their mask."""
    head = tl.program_id(1).to(tl.int64)
    offset = tl.arange(0, ROWS)[:, None]
    x_ptr += ((head // heads * length + first) * heads + head % heads) * HEAD_DIM
    place = x_ptr + (offset * (heads * HEAD_DIM) + tl.arange(0, HEAD_DIM)[None, :])
    return place, offset < end - first


@triton.jit
def add_rows(
    rows, x_ptr, first, end, length, heads, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Add [ROWS, D] to what is there."""
    place, inside = rows_of(x_ptr, first, end, length, heads, ROWS, HEAD_DIM)
    rows += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, rows.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_square(x_ptr, HEAD_DIM: tl.constexpr):
    """This program's head of x [B, H, D, D]."""
    channel = tl.arange(0, HEAD_DIM)
    x_ptr += tl.program_id(1).to(tl.int64) * (HEAD_DIM * HEAD_DIM)
    return tl.load(x_ptr + channel[:, None] * HEAD_DIM + channel[None, :])


@triton.jit
def storeroom_for_sums(square, square_ptr, vector, vector_ptr, HEAD_DIM: tl.constexpr):
    """[D, D] and [D] to this program's part of [splits, B, H, D, D] and [splits, B, H, D]."""
    part = tl.program_id(0) * tl.num_programs(1).to(tl.int64) + tl.program_id(1)
    channel = tl.arange(0, HEAD_DIM)
    place = channel[:, None] * HEAD_DIM + channel[None, :]
    tl.store(square_ptr + part * (HEAD_DIM * HEAD_DIM) + place, square)
    tl.store(vector_ptr + part * HEAD_DIM + channel, vector)


@launched
@triton.jit(do_not_specialize=["length", "heads", "rows"])
def linear_query_gradients_kernel(
    q_ptr, d_out_ptr, mix_ptr, normalizer_ptr, onto_ptr, d_mix_ptr, weighted_ptr, d_bias_ptr,
    length, heads, rows, stride_qb, stride_ql, stride_qh, stride_db, stride_dl, stride_dh,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, HEAD_DIM)
    mix = load_square(mix_ptr, HEAD_DIM)
    normalizer = tl.load(normalizer_ptr + tl.program_id(1) * HEAD_DIM + channel)[None, :]
    d_mix = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    # Both added up over the rows of a tile only at the end: each sum would wait for every warp.
    weighted = tl.zeros((TILE, HEAD_DIM), tl.float32)
    d_bias = tl.zeros((TILE, HEAD_DIM), tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * rows, length)
    for first in range(tl.program_id(0) * rows, end, TILE):
        q = load_rows(q_ptr, first, end, heads, stride_qb, stride_ql, stride_qh, TILE, HEAD_DIM)
        d_y = load_rows(
            d_out_ptr, first, end, heads, stride_db, stride_dl, stride_dh, TILE, HEAD_DIM
        )
        phi = apply_feature_map(q.to(tl.float32), FEATURE_MAP)  # [TILE, D]
        weights = phi * normalizer
        divisor = (1e-5 + tl.sum(weights, 1))[:, None]
        weights = weights / divisor
        # With the few rows as columns: each warp holds its own part of mix.
        d_weights = tl.trans(tl.dot(mix, tl.trans(d_y)))
        delta = tl.sum(weights * d_weights, 1)[:, None]
        d_phi = (d_weights - delta) * (normalizer / divisor)
        d_q = through_feature_map(phi, d_phi, FEATURE_MAP)
        add_rows(d_q, onto_ptr, first, end, length, heads, TILE, HEAD_DIM)
        weighted += weights * delta
        d_bias += d_y.to(tl.float32)
        d_mix = tl.dot(tl.trans(weights.to(d_y.dtype)), d_y, d_mix)  # [D, D]
    storeroom_for_sums(d_mix, d_mix_ptr, tl.sum(weighted, 0), weighted_ptr, HEAD_DIM)
    part = tl.program_id(0) * tl.num_programs(1).to(tl.int64) + tl.program_id(1)
    tl.store(d_bias_ptr + part * HEAD_DIM + channel, tl.sum(d_bias, 0))


@launched
@triton.jit(do_not_specialize=["length", "heads"])
def linear_key_gradients_kernel(
    k_ptr, v_ptr, d_state_ptr, peak_ptr, d_normalizer_ptr, onto_k_ptr, onto_v_ptr, length, heads,
    stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    own = tl.program_id(1) * HEAD_DIM + tl.arange(0, HEAD_DIM)
    k = load_rows(k_ptr, first, length, heads, stride_kb, stride_kl, stride_kh, ROWS, HEAD_DIM)
    v = load_rows(v_ptr, first, length, heads, stride_vb, stride_vl, stride_vh, ROWS, HEAD_DIM)
    d_state = load_square(d_state_ptr, HEAD_DIM)
    peak = tl.load(peak_ptr + own)[None, :]  # of the rows of d_state
    d_normalizer = tl.load(d_normalizer_ptr + own)[None, :]
    phi = apply_feature_map(k.to(tl.float32), FEATURE_MAP)  # [ROWS, D]
    d_phi = tl.dot(v, tl.trans(d_state)) * peak + d_normalizer
    d_k = through_feature_map(phi, d_phi, FEATURE_MAP)
    add_rows(d_k, onto_k_ptr, first, length, length, heads, ROWS, HEAD_DIM)
    highest = tl.max(peak)
    d_v = tl.dot((phi * (peak / highest)).to(d_state.dtype), d_state) * highest
    add_rows(d_v, onto_v_ptr, first, length, length, heads, ROWS, HEAD_DIM)


@launched
@triton.jit(do_not_specialize=["length", "heads", "rows"])
def state_jvp_kernel(
    k_ptr, v_ptr, tk_ptr, tv_ptr, t_state_ptr, t_normalizer_ptr, length, heads, rows,
    stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_tkb, stride_tkl, stride_tkh, stride_tvb, stride_tvl, stride_tvh,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    t_state = tl.zeros((HEAD_DIM, HEAD_DIM), tl.float32)
    t_normalizer = tl.zeros((TILE, HEAD_DIM), tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * rows, length)
    for first in range(tl.program_id(0) * rows, end, TILE):
        k = load_rows(k_ptr, first, end, heads, stride_kb, stride_kl, stride_kh, TILE, HEAD_DIM)
        v = load_rows(v_ptr, first, end, heads, stride_vb, stride_vl, stride_vh, TILE, HEAD_DIM)
        tk = load_rows(
            tk_ptr, first, end, heads, stride_tkb, stride_tkl, stride_tkh, TILE, HEAD_DIM
        )
        tv = load_rows(
            tv_ptr, first, end, heads, stride_tvb, stride_tvl, stride_tvh, TILE, HEAD_DIM
        )
        phi = apply_feature_map(k.to(tl.float32), FEATURE_MAP)  # [TILE, D]
        t_phi = through_feature_map(phi, tk.to(tl.float32), FEATURE_MAP)
        t_normalizer += t_phi
        # Rows past the end have zeros for v, tk and tv.
        t_state = tl.dot(tl.trans(t_phi.to(v.dtype)), v, t_state)  # [D, D]
        t_state = tl.dot(tl.trans(phi.to(v.dtype)), tv, t_state)
    storeroom_for_sums(t_state, t_state_ptr, tl.sum(t_normalizer, 0), t_normalizer_ptr, HEAD_DIM)


@launched
@triton.jit(do_not_specialize=["length", "heads"])
def rows_jvp_kernel(
    q_ptr, tq_ptr, mix_ptr, t_mix_ptr, normalizer_ptr, t_normalizer_ptr, t_bias_ptr, t_out_ptr,
    length, heads, stride_qb, stride_ql, stride_qh, stride_tqb, stride_tql, stride_tqh,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    channel = tl.arange(0, HEAD_DIM)
    own = tl.program_id(1) * HEAD_DIM + channel
    q = load_rows(q_ptr, first, length, heads, stride_qb, stride_ql, stride_qh, ROWS, HEAD_DIM)
    tq = load_rows(tq_ptr, first, length, heads, stride_tqb, stride_tql, stride_tqh, ROWS, HEAD_DIM)
    normalizer = tl.load(normalizer_ptr + own)[None, :]
    t_normalizer = tl.load(t_normalizer_ptr + own)[None, :]
    phi = apply_feature_map(q.to(tl.float32), FEATURE_MAP)  # [ROWS, D]
    t_phi = through_feature_map(phi, tq.to(tl.float32), FEATURE_MAP)
    divisor = (1e-5 + tl.sum(phi * normalizer, 1))[:, None]
    t_divisor = tl.sum(t_phi * normalizer + phi * t_normalizer, 1)[:, None]
    weights = phi * normalizer / divisor
    t_weights = (t_phi * normalizer - weights * t_divisor) / divisor
    t_rows = tl.dot(weights.to(q.dtype), load_square(t_mix_ptr, HEAD_DIM))
    t_rows = tl.dot(t_weights.to(q.dtype), load_square(mix_ptr, HEAD_DIM), t_rows)
    t_rows += tl.load(t_bias_ptr + channel).to(tl.float32)[None, :]
    place, inside = rows_of(t_out_ptr, first, length, length, heads, ROWS, HEAD_DIM)
    tl.store(place, t_rows.to(t_out_ptr.dtype.element_ty), mask=inside)


def query_gradients(
    q: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    proj_weight: torch.Tensor,
    feature_map: str,
    d_out: torch.Tensor,
    onto: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add q's gradient to `onto`; sums over queries dG = r^T dy [B, H, D, D], those for the
    normalizer [B, H, D], and those for the bias [D]."""
    mix = project_state(state, normalizer, proj_weight, q.dtype)
    rows, d_mix, weighted = room_for_sums(q)
    d_bias = torch.empty_like(weighted)
    linear_query_gradients_kernel[len(d_mix), q.shape[0] * q.shape[2]](
        q, d_out, mix, normalizer.contiguous(), onto, d_mix, weighted, d_bias,
        q.shape[1], q.shape[2], rows, *q.stride()[:3], *d_out.stride()[:3],
        HEAD_DIM=q.shape[3], TILE=TILE, FEATURE_MAP=feature_map, **SUMS_LAUNCH,
    )  # fmt: skip
    own = normalizer.clamp_min(SMALLEST)
    return d_mix.sum(0) / own[..., None], -weighted.sum(0) / own, d_bias.sum((0, 1, 2))


def key_gradients(
    k: torch.Tensor,
    v: torch.Tensor,
    d_state: torch.Tensor,
    d_normalizer: torch.Tensor,
    feature_map: str,
    onto: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Add the gradients of k and v to `onto`, given those of the sums over keys."""
    # Gradients are small: with 1 for a row's largest number no row falls below float16.
    peak = d_state.abs().amax(-1).clamp_min(SMALLEST)
    d_state = (d_state / peak[..., None]).to(k.dtype)
    batch, length, heads, dim = k.shape
    linear_key_gradients_kernel[triton.cdiv(length, ROWS), batch * heads](
        k, v, d_state, peak, d_normalizer, *onto, length, heads,
        *k.stride()[:3], *v.stride()[:3],
        HEAD_DIM=dim, ROWS=ROWS, FEATURE_MAP=feature_map, **LAUNCH,
    )  # fmt: skip


def state_jvp(
    k: torch.Tensor, v: torch.Tensor, tk: torch.Tensor, tv: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tangents float32 [B, H, D, D] and [B, H, D] of the sums over keys."""
    rows, t_state, t_normalizer = room_for_sums(k)
    strides = [stride for x in (k, v, tk, tv) for stride in x.stride()[:3]]
    state_jvp_kernel[len(t_state), k.shape[0] * k.shape[2]](
        k, v, tk, tv, t_state, t_normalizer, k.shape[1], k.shape[2], rows, *strides,
        HEAD_DIM=k.shape[3], TILE=TILE, FEATURE_MAP=feature_map, **SUMS_LAUNCH,
    )  # fmt: skip
    return t_state.sum(0), t_normalizer.sum(0)


def rows_jvp(
    q: torch.Tensor,
    tq: torch.Tensor,
    mix: torch.Tensor,
    t_mix: torch.Tensor,
    normalizer: torch.Tensor,
    t_normalizer: torch.Tensor,
    t_bias: torch.Tensor,
    feature_map: str,
) -> torch.Tensor:
    """Tangent [B, L, H, D] of r G + b, in q's dtype; `mix` is G."""
    own = normalizer.clamp_min(SMALLEST)[..., None]
    mix, t_mix = ((x / own).to(q.dtype) for x in (mix, t_mix))
    batch, length, heads, dim = q.shape
    t_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows_jvp_kernel[triton.cdiv(length, ROWS), batch * heads](
        q, tq, mix, t_mix, normalizer.contiguous(), t_normalizer, t_bias.contiguous(), t_out,
        length, heads, *q.stride()[:3], *tq.stride()[:3],
        HEAD_DIM=dim, ROWS=ROWS, FEATURE_MAP=feature_map, **LAUNCH,
    )  # fmt: skip
    return t_out
