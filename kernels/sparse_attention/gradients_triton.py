"""The gradients of block-sparse attention in Triton.

A program of the gradient for q goes through the key blocks of its queries, one of the gradients
for k and v through the query blocks that selected its keys: nothing is added up in memory, so all
sums have one order.
"""

import torch
import triton
import triton.language as tl

from ..checks import in_steps_of_16_bytes
from ..dispatch import capability, has_tma, launching_on
from ..launching import launched
from ..tuning import gradient_launch
from .gradients_reference import transpose_map
from .reference import score_scale
from .triton import load_rows, map_of_rows, mask_end, sparse_attention, store_rows

ROWS = 64  # of a program of the kernel below
LAUNCH = {"num_warps": 4, "num_stages": 1}  # it only moves data: the same on every card
LONG = 2  # so many times the mean makes a list of query blocks a long one


@triton.jit
def load_once(x_ptr, first, length, stride, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[ROWS, D] of the head that x_ptr points to from row `first` on, zeros past the end."""
    row = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(x_ptr + row * stride + channel, mask=row < length, other=0.0)


@triton.jit
def store_once(
    rows, x_ptr, sample, head, heads, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Write rows [ROWS, D] to a head of x [B, L, H, D], contiguous, from row `first` on."""
    row = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
    place = ((sample.to(tl.int64) * length + row) * heads + head) * HEAD_DIM
    place += tl.arange(0, HEAD_DIM)[None, :]
    tl.store(x_ptr + place, rows.to(x_ptr.dtype.element_ty), mask=row < length)


@launched
@triton.jit(do_not_specialize=["length", "rows", "scale"])
def row_sums_kernel(
    out_ptr, d_out_ptr, lse_ptr, shift_ptr, d_shift_ptr, length, rows, scale,
    stride_ob, stride_ol, stride_oh, stride_gb, stride_gl, stride_gh,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    own, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    head = sample * tl.num_programs(1) + own
    first = tl.program_id(0) * ROWS
    out_ptr += sample * stride_ob + own * stride_oh
    d_out_ptr += sample * stride_gb + own * stride_gh
    out = load_once(out_ptr, first, length, stride_ol, ROWS, HEAD_DIM)
    d_out = load_once(d_out_ptr, first, length, stride_gl, ROWS, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    row = first + tl.arange(0, ROWS)
    # Rows past the end get no weight, 2^-inf.
    lse = tl.load(lse_ptr + head * length + row, mask=row < length, other=float("inf"))
    tl.store(shift_ptr + head * rows + row, lse / -scale)
    tl.store(d_shift_ptr + head * rows + row, -delta)


@triton.jit(do_not_specialize=["length", "count", "scale"])
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, shift_ptr, d_shift_ptr, block_map_ptr, dq_ptr,
    length, count, scale, stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    own, sample = tl.program_id(1), tl.program_id(2)
    head = (sample * tl.num_programs(1) + own).to(tl.int64)
    q_ptr += sample.to(tl.int64) * stride_qb + own.to(tl.int64) * stride_qh
    d_out_ptr += sample.to(tl.int64) * stride_gb + own.to(tl.int64) * stride_gh
    if not TMA:
        k_ptr += sample.to(tl.int64) * stride_kb + own.to(tl.int64) * stride_kh
        v_ptr += sample.to(tl.int64) * stride_vb + own.to(tl.int64) * stride_vh
    first_row = tl.program_id(0) * ROWS
    blocks = tl.cdiv(length, BLOCK_Q)
    block_map_ptr += (head * blocks + first_row // BLOCK_Q) * count
    row = head * (blocks * BLOCK_Q) + first_row + tl.arange(0, ROWS)
    shift = tl.load(shift_ptr + row)[:, None] * scale
    d_shift = tl.load(d_shift_ptr + row)[:, None]
    # [ROWS, D] all.
    q = load_once(q_ptr, first_row, length, stride_ql, ROWS, HEAD_DIM)
    d_out = load_once(d_out_ptr, first_row, length, stride_gl, ROWS, HEAD_DIM)
    dq = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for i in range(count * (BLOCK_K // STEP)):
        block = tl.load(block_map_ptr + i // (BLOCK_K // STEP))
        first = block * BLOCK_K + i % (BLOCK_K // STEP) * STEP
        # [STEP, D] both.
        k = load_rows(k_ptr, stride_kl, sample, own, first, length, STEP, HEAD_DIM, TMA)
        v = load_rows(v_ptr, stride_vl, sample, own, first, length, STEP, HEAD_DIM, TMA)
        scores = mask_end(tl.dot(q, tl.trans(k)), first, length, STEP)  # [ROWS, STEP]
        d_weights = tl.dot(d_out, tl.trans(v))
        d_scores = tl.exp2(scores * scale + shift) * (d_weights + d_shift)
        dq = tl.dot(d_scores.to(k.dtype), k, dq)
    # 1 / sqrt(D), as scale has log2(e) in it.
    store_rows(dq * (scale * 0.6931471805599453), dq_ptr, first_row, length, ROWS, HEAD_DIM, False)


@triton.jit(do_not_specialize=["length", "heads", "scale"])
def key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, shift_ptr, d_shift_ptr, queries_ptr, ends_ptr, order_ptr,
    dk_ptr, dv_ptr, length, heads, scale, stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_gb, stride_gl, stride_gh,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    block = tl.load(order_ptr + tl.program_id(0) // (BLOCK_K // ROWS))
    head = block // tl.cdiv(length, BLOCK_K)
    own, sample = head % heads, head // heads
    if not TMA:
        q_ptr += sample.to(tl.int64) * stride_qb + own.to(tl.int64) * stride_qh
        d_out_ptr += sample.to(tl.int64) * stride_gb + own.to(tl.int64) * stride_gh
    k_ptr += sample.to(tl.int64) * stride_kb + own.to(tl.int64) * stride_kh
    v_ptr += sample.to(tl.int64) * stride_vb + own.to(tl.int64) * stride_vh
    first_row = block % tl.cdiv(length, BLOCK_K) * BLOCK_K
    first_row += tl.program_id(0) % (BLOCK_K // ROWS) * ROWS
    first_query = head * tl.cdiv(length, BLOCK_Q)
    # [ROWS, D] all.
    k = load_once(k_ptr, first_row, length, stride_kl, ROWS, HEAD_DIM)
    v = load_once(v_ptr, first_row, length, stride_vl, ROWS, HEAD_DIM)
    dk = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    dv = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    begin, end = tl.load(ends_ptr + block), tl.load(ends_ptr + block + 1)
    queries_ptr += begin
    for i in range((end - begin) * (BLOCK_Q // STEP)):
        query = tl.load(queries_ptr + i // (BLOCK_Q // STEP))
        part = i % (BLOCK_Q // STEP) * STEP
        row = (query * BLOCK_Q + part).to(tl.int64) + tl.arange(0, STEP)
        shift, d_shift = tl.load(shift_ptr + row)[None, :], tl.load(d_shift_ptr + row)[None, :]
        first = (query - first_query) * BLOCK_Q + part
        # [STEP, D] both.
        q = load_rows(q_ptr, stride_ql, sample, own, first, length, STEP, HEAD_DIM, TMA)
        d_out = load_rows(d_out_ptr, stride_gl, sample, own, first, length, STEP, HEAD_DIM, TMA)
        # [ROWS, STEP]. Both products start from the shifts, which then need no registers.
        scores = tl.dot(k, tl.trans(q), tl.broadcast_to(shift, (ROWS, STEP)))
        weights = tl.exp2(scores * scale)
        dv = tl.dot(weights.to(d_out.dtype), d_out, dv)
        d_weights = tl.dot(v, tl.trans(d_out), tl.broadcast_to(d_shift, (ROWS, STEP)))
        dk = tl.dot((weights * d_weights).to(q.dtype), q, dk)
    dk *= scale * 0.6931471805599453
    store_once(dk, dk_ptr, sample, own, heads, first_row, length, ROWS, HEAD_DIM)
    store_once(dv, dv_ptr, sample, own, heads, first_row, length, ROWS, HEAD_DIM)


@triton.jit(do_not_specialize=["length", "count", "scale"])
def tangent_kernel(
    q_ptr, k_ptr, v_ptr, tq_ptr, tk_ptr, tv_ptr, out_ptr, lse_ptr, block_map_ptr, t_out_ptr,
    length, count, scale, stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    stride_tqb, stride_tql, stride_tqh, stride_tkb, stride_tkl, stride_tkh,
    stride_tvb, stride_tvl, stride_tvh, stride_ob, stride_ol, stride_oh,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    own, sample = tl.program_id(1), tl.program_id(2)
    head = (sample * tl.num_programs(1) + own).to(tl.int64)
    q_ptr += sample.to(tl.int64) * stride_qb + own.to(tl.int64) * stride_qh
    tq_ptr += sample.to(tl.int64) * stride_tqb + own.to(tl.int64) * stride_tqh
    out_ptr += sample.to(tl.int64) * stride_ob + own.to(tl.int64) * stride_oh
    if not TMA:
        k_ptr += sample.to(tl.int64) * stride_kb + own.to(tl.int64) * stride_kh
        v_ptr += sample.to(tl.int64) * stride_vb + own.to(tl.int64) * stride_vh
        tk_ptr += sample.to(tl.int64) * stride_tkb + own.to(tl.int64) * stride_tkh
        tv_ptr += sample.to(tl.int64) * stride_tvb + own.to(tl.int64) * stride_tvh
    first_row = tl.program_id(0) * ROWS
    block_map_ptr += (head * tl.cdiv(length, BLOCK_Q) + first_row // BLOCK_Q) * count
    row = first_row + tl.arange(0, ROWS)
    # Rows past the end get no weight, 2^-inf.
    lse = tl.load(lse_ptr + head * length + row, mask=row < length, other=float("inf"))
    # [ROWS, D] all.
    q = load_once(q_ptr, first_row, length, stride_ql, ROWS, HEAD_DIM)
    tq = load_once(tq_ptr, first_row, length, stride_tql, ROWS, HEAD_DIM)
    acc = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    row_sum = tl.zeros((ROWS,), tl.float32)
    for i in range(count * (BLOCK_K // STEP)):
        block = tl.load(block_map_ptr + i // (BLOCK_K // STEP))
        first = block * BLOCK_K + i % (BLOCK_K // STEP) * STEP
        # [STEP, D] all.
        k = load_rows(k_ptr, stride_kl, sample, own, first, length, STEP, HEAD_DIM, TMA)
        scores = mask_end(tl.dot(q, tl.trans(k)), first, length, STEP)  # [ROWS, STEP]
        t_scores = tl.dot(tq, tl.trans(k))
        tk = load_rows(tk_ptr, stride_tkl, sample, own, first, length, STEP, HEAD_DIM, TMA)
        t_scores = tl.dot(q, tl.trans(tk), t_scores)
        weights = tl.exp2(scores * scale - lse[:, None])
        tv = load_rows(tv_ptr, stride_tvl, sample, own, first, length, STEP, HEAD_DIM, TMA)
        acc = tl.dot(weights.to(tv.dtype), tv, acc)
        v = load_rows(v_ptr, stride_vl, sample, own, first, length, STEP, HEAD_DIM, TMA)
        t_weights = (weights * (t_scores * (scale * 0.6931471805599453))).to(v.dtype)
        # Of what is multiplied, so that its rounding errors count for v - out only.
        row_sum += tl.sum(t_weights.to(tl.float32), 1)
        acc = tl.dot(t_weights, v, acc)
    out = load_once(out_ptr, first_row, length, stride_ol, ROWS, HEAD_DIM).to(tl.float32)
    acc -= row_sum[:, None] * out
    store_rows(acc, t_out_ptr, first_row, length, ROWS, HEAD_DIM, False)


def sparse_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int,
    block_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the selected key blocks [B, L, H, D], and lse float32 [B, H, L]."""
    batch, length, heads, _ = q.shape
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    out = sparse_attention(q, k, v, block_map, block_q, block_k, _room(q), False, lse)
    return out, lse


def sparse_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int,
    block_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, contiguous [B, L, H, D] in q's dtype."""
    out, d_out = _side_by_side(out), _side_by_side(d_out)
    sums = row_sums(out, lse, d_out, block_q)
    lists = transpose_map(block_map, triton.cdiv(q.shape[1], block_k))
    dq = query_gradient(q, k, v, d_out, sums, block_map, block_q, block_k)
    dk, dv = key_gradients(q, k, v, d_out, sums, lists, block_q, block_k)
    return dq, dk, dv


def row_sums(
    out: torch.Tensor, lse: torch.Tensor, d_out: torch.Tensor, block_q: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What P and dS take per row, so that P = 2^(scale (q k^T + shift)), dS = P (dP + d_shift).

    Float32 [B, H, NQ * block_q]: -lse / scale and -rowsum(out * d_out), past the end -inf and 0.
    """
    batch, length, heads, dim = out.shape
    rows = triton.cdiv(length, block_q) * block_q
    shift, d_shift = (
        torch.empty(batch, heads, rows, dtype=torch.float32, device=out.device) for _ in range(2)
    )
    with launching_on(out):
        row_sums_kernel[rows // ROWS, heads, batch](
            out, d_out, lse.contiguous(), shift, d_shift, length, rows, score_scale(out),
            *out.stride()[:3], *d_out.stride()[:3], ROWS=ROWS, HEAD_DIM=dim, **LAUNCH,
        )  # fmt: skip
    return shift, d_shift


def query_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor],
    block_map: torch.Tensor,
    block_q: int,
    block_k: int,
) -> torch.Tensor:
    """dq; `sums` as `row_sums` gives them."""
    batch, length, heads, dim = q.shape
    launch = gradient_launch(capability(q.device), "query", block_q, block_k)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3]
    tma, (keys, values) = _maps(launch["STEP"], k, v)
    dq = _room(q)
    with launching_on(q):
        query_gradient_kernel[triton.cdiv(length, launch["ROWS"]), heads, batch](
            q, keys, values, d_out, *sums, block_map.contiguous(), dq,
            length, block_map.shape[3], score_scale(q), *strides,
            HEAD_DIM=dim, BLOCK_Q=block_q, BLOCK_K=block_k, TMA=tma, **launch,
        )  # fmt: skip
    return dq


def key_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    sums: tuple[torch.Tensor, torch.Tensor],
    lists: tuple[torch.Tensor, torch.Tensor],
    block_q: int,
    block_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv; `sums` as `row_sums`, `lists` as `transpose_map` gives them."""
    length, heads, dim = q.shape[1:]
    launch = gradient_launch(capability(q.device), "keys", block_k, block_q)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3]
    tma, (queries, d_rows) = _maps(launch["STEP"], q, d_out)
    order = long_first(lists[1])
    dk, dv = _room(k), _room(v)
    with launching_on(q):
        key_gradients_kernel[len(order) * (block_k // launch["ROWS"]),](
            queries, k, v, d_rows, *sums, *lists, order, dk, dv,
            length, heads, score_scale(q), *strides,
            HEAD_DIM=dim, BLOCK_Q=block_q, BLOCK_K=block_k, TMA=tma, **launch,
        )  # fmt: skip
    return dk, dv


def long_first(ends: torch.Tensor) -> torch.Tensor:
    """The key blocks in the order in which they start, int32: those with long lists first.

    So that the last programs are short. All others one head after the other, which then shares its
    queries through the GPU's cache.
    """
    counts = ends.diff()
    long = counts * (counts > LONG * counts.float().mean())
    return long.argsort(descending=True, stable=True).int()


def sparse_attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tq: torch.Tensor,
    tk: torch.Tensor,
    tv: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int,
    block_k: int,
) -> torch.Tensor:
    """The tangent of out, contiguous [B, L, H, D] in q's dtype."""
    batch, length, heads, dim = q.shape
    out, tq, tk, tv = map(_side_by_side, (out, tq, tk, tv))
    launch = gradient_launch(capability(q.device), "tangent", block_q, block_k)
    strides = [step for x in (q, k, v, tq, tk, tv, out) for step in x.stride()[:3]]
    tma, (k, v, tk, tv) = _maps(launch["STEP"], k, v, tk, tv)
    t_out = _room(q)
    with launching_on(q):
        tangent_kernel[triton.cdiv(length, launch["ROWS"]), heads, batch](
            q, k, v, tq, tk, tv, out, lse.contiguous(), block_map.contiguous(), t_out,
            length, block_map.shape[3], score_scale(q), *strides,
            HEAD_DIM=dim, BLOCK_Q=block_q, BLOCK_K=block_k, TMA=tma, **launch,
        )  # fmt: skip
    return t_out


def _maps(rows: int, *tensors: torch.Tensor) -> tuple[bool, list]:
    """Whether all [B, L, H, D] tensors can be read by tensor map, and their maps or they."""
    tma = has_tma(tensors[0].device) and all(map(in_steps_of_16_bytes, tensors))
    return tma, [map_of_rows(x, rows) for x in tensors] if tma else list(tensors)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy where its channels do not lie side by side or a row stands for several."""
    return x if in_steps_of_16_bytes(x) and x.stride(-1) == 1 else x.contiguous()


def _room(like: torch.Tensor) -> torch.Tensor:
    """A new contiguous tensor of the same shape."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
