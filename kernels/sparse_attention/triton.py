"""Block-sparse attention in Triton: one program per query block and head."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..checks import in_steps_of_16_bytes
from ..dispatch import capability, has_tma, interpreting, launching_on
from ..int8_quant.triton import larger, largest
from ..launching import launched
from ..tuning import attention_launch
from .reference import VALUE_LIMIT, Int8Blocks, Quantized, score_scale

LAUNCH = {"num_warps": 8, "num_stages": 1}  # of what only moves data, the same on every card
SOME_ROWS = 512  # that stand for all, at most
ROWS_AT_ONCE = 128  # of them
HEADROOM = 4.0  # times what they tell: by a power of two e4m3 rounds the same, but near 0
MENDED = 16  # blocks of a program that mends values
SOME_LAUNCH = {"num_warps": 8, "num_stages": 2}
# Four numbers as e4m3, which sm_89 and newer cards round to in one instruction.
TO_E4M3 = tl.constexpr("""{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}""")


@triton.jit
def soft_weights(scores, scale, row_max, SHIFT: tl.constexpr):
    """2^(scale * scores - m + SHIFT), the new maximum m, and the factor of all sums so far.

    The shift lifts the weights in e4m3, whose smallest number is 2^-9.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - (new_max - SHIFT)[:, None])
    return weights, new_max, tl.exp2(row_max - new_max)


@triton.jit
def mask_end(scores, first, length, BLOCK_K: tl.constexpr):
    """Hide the keys past the end.

    Without a branch, though only the last key block has any: a branch between the two products
    raced with the asynchronous fp8 one on Hopper (Triton 3.6).
    """
    key = tl.arange(0, BLOCK_K)
    return tl.where(key[None, :] < (length - first).to(tl.int32), scores, float("-inf"))


@triton.jit
def rounded_once(x, dtype: tl.constexpr, CUT: tl.constexpr):
    """x in e4m3 or float16, rounded once, also where Triton would cut e4m3 off: see `cuts_e4m3`."""
    if CUT and dtype == tl.float8e4nv:
        four = tl.inline_asm_elementwise(
            TO_E4M3, "=r,r,r,r,r", [x], dtype=tl.int8, is_pure=True, pack=4
        )
        rounded = four.to(dtype, bitcast=True)
    else:
        rounded = x.to(dtype)
    return rounded


@triton.jit
def load_rows(
    x_ptr, stride, sample, head, first, length,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[ROWS, D] from row `first` on: of a tensor map of [B, H, L, D] under TMA, else of the head
    that x_ptr points to."""
    if TMA:
        tile = x_ptr.load([sample, head, first, 0]).reshape(ROWS, HEAD_DIM)
    else:
        # Past the end the last row is read again, so that no load needs a mask.
        row = tl.minimum(tl.arange(0, ROWS), length - 1 - first)[:, None]
        channel = tl.arange(0, HEAD_DIM)[None, :]
        tile = tl.load(x_ptr + first.to(tl.int64) * stride + (row * stride + channel))
    return tile


@triton.jit
def load_block(
    x_ptr, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """[ROWS, COLUMNS], number `block` of such blocks one after another; a tensor map under TMA."""
    if TMA:
        tile = x_ptr.load([block * ROWS, 0])
    else:
        offset = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tile = tl.load(x_ptr + block.to(tl.int64) * (ROWS * COLUMNS) + offset)
    return tile


@triton.jit
def output_rows(out_ptr, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers [ROWS, D] to this program's head of out [B, L, H, D] from row `first` on, and
    their mask."""
    heads = tl.num_programs(1)
    offset = tl.arange(0, ROWS)[:, None]
    row = tl.program_id(2).to(tl.int64) * length + first
    out_ptr += (row * heads + tl.program_id(1)) * HEAD_DIM
    place = out_ptr + offset * (heads * HEAD_DIM) + tl.arange(0, HEAD_DIM)[None, :]
    return place, offset < length - first


@triton.jit
def store_rows(
    rows, out_ptr, first, length, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, ADD: tl.constexpr
):
    """Write rows [ROWS, D] to `out`, on top of what waits there if asked for."""
    place, inside = output_rows(out_ptr, first, length, ROWS, HEAD_DIM)
    if ADD:
        rows += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, rows.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "count", "scale"])
def sparse_attention_kernel(
    q_ptr, k_ptr, v_ptr, block_map_ptr, out_ptr, lse_ptr,
    length, count, scale, stride_qb, stride_ql, stride_qh,
    stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ADD: tl.constexpr, LSE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    own, sample = tl.program_id(1), tl.program_id(2)
    head = sample * tl.num_programs(1) + own
    q_ptr += sample.to(tl.int64) * stride_qb + own.to(tl.int64) * stride_qh
    if not TMA:
        k_ptr += sample.to(tl.int64) * stride_kb + own.to(tl.int64) * stride_kh
        v_ptr += sample.to(tl.int64) * stride_vb + own.to(tl.int64) * stride_vh
    block_map_ptr += (head * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * count
    # Rows stay int32 while the loop runs: twice the width would spill registers.
    first_row = tl.program_id(0) * BLOCK_Q
    row = first_row + tl.arange(0, BLOCK_Q)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None, :]
    # [BLOCK_Q, D] both.
    q = tl.load(q_ptr + row.to(tl.int64) * stride_ql + channel, mask=row < length, other=0.0)
    acc = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    for i in range(count):
        first = tl.load(block_map_ptr + i) * BLOCK_K
        # [BLOCK_K, D] both.
        k = load_rows(k_ptr, stride_kl, sample, own, first, length, BLOCK_K, HEAD_DIM, TMA)
        scores = tl.dot(q, tl.trans(k))  # [BLOCK_Q, BLOCK_K]
        scores = mask_end(scores, first, length, BLOCK_K)
        v = load_rows(v_ptr, stride_vl, sample, own, first, length, BLOCK_K, HEAD_DIM, TMA)
        weights, row_max, factor = soft_weights(scores, scale, row_max, 0)
        row_sum = row_sum * factor + tl.sum(weights, 1)
        acc = acc * factor[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc)
    if LSE:
        p_lse = lse_ptr + head.to(tl.int64) * length + first_row
        row = tl.arange(0, BLOCK_Q)
        tl.store(p_lse + row, row_max + tl.log2(row_sum), mask=row < length - first_row)
    rows = acc * (1.0 / row_sum)[:, None]
    store_rows(rows, out_ptr, first_row, length, BLOCK_Q, HEAD_DIM, ADD)


@triton.jit(do_not_specialize=["length", "count"])
def sage_attention_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, block_map_ptr, out_ptr,
    length, count,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, FP8: tl.constexpr,
    CUT: tl.constexpr, ADD: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    q_block = head * tl.num_programs(0) + tl.program_id(0)
    first_k_block = head * tl.cdiv(length, BLOCK_K)
    block_map_ptr += q_block.to(tl.int64) * count
    first_row = tl.program_id(0) * BLOCK_Q
    channel = tl.arange(0, HEAD_DIM)[None, :]
    q = load_block(q_ptr, q_block, BLOCK_Q, HEAD_DIM, False)  # [BLOCK_Q, D]
    q_scale = tl.load(q_scale_ptr + q_block)
    acc = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    for i in range(count):
        block = tl.load(block_map_ptr + i)
        k = load_block(k_ptr, first_k_block + block, BLOCK_K, HEAD_DIM, TMA)  # [BLOCK_K, D]
        scores = tl.dot(q, tl.trans(k)).to(tl.float32)  # [BLOCK_Q, BLOCK_K]
        scores = mask_end(scores, block * BLOCK_K, length, BLOCK_K)
        scale = q_scale * tl.load(k_scale_ptr + first_k_block + block)
        v = load_block(v_ptr, first_k_block + block, HEAD_DIM, BLOCK_K, TMA)  # [D, BLOCK_K]
        v = tl.trans(v)
        weights, row_max, factor = soft_weights(scores, scale, row_max, 8 if FP8 else 0)
        row_sum = row_sum * factor + tl.sum(weights, 1)
        acc = acc * factor[:, None]
        weights = rounded_once(weights, v.dtype, CUT)
        if FP8:
            # A sum of its own per key block: fp8 products add up in about 14 bits on Hopper.
            acc += tl.dot(weights, v)
        else:
            acc = tl.dot(weights, v, acc)
    rows = acc * (1.0 / row_sum)[:, None] * tl.load(v_scale_ptr + head * HEAD_DIM + channel)
    store_rows(rows, out_ptr, first_row, length, BLOCK_Q, HEAD_DIM, ADD)


@triton.jit
def round_block(x):
    """x as int8, clamp(round_half_even(x * (127 / amax))), and its scale amax / 127."""
    amax = larger(largest(tl.abs(x)), 1e-8)
    # Clamped before the sum below, so that no FMA can skip the rounding of the product.
    full_scale = tl.full(amax.shape, 127.0, tl.float32)
    scaled = tl.clamp(x * tl.div_rn(full_scale, amax), -127.0, 127.0)
    # Adding 1.5 * 2^23 leaves no bit for the fraction, and fp32 additions round half to even.
    rounded = (scaled + 12582912.0) - 12582912.0
    return rounded.to(tl.int8), tl.div_rn(amax, full_scale)


@triton.jit
def place_in_block(
    row, column, WIDTH: tl.constexpr, ITEM: tl.constexpr, SWIZZLED: tl.constexpr
):  # fmt: skip
    """Where (row, column) of a block lies; rows of WIDTH items of ITEM bytes, see hopper.py."""
    if SWIZZLED:
        chunk: tl.constexpr = 16 // ITEM
        turn = row // (128 // (WIDTH * ITEM)) % (WIDTH // chunk)
        place = row * WIDTH + ((column // chunk) ^ turn) * chunk + column % chunk
        place = tl.max_contiguous(tl.multiple_of(place, [1, chunk]), [1, chunk])
    else:
        place = row * WIDTH + column
    return place


@launched
@triton.jit(do_not_specialize=["length", "heads"])
def quantize_heads_kernel(
    x_ptr, center_ptr, integers_ptr, scales_ptr, length, heads, stride_xb, stride_xl, stride_xh,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, CENTERED: tl.constexpr,
    SWIZZLED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    block = head * tl.num_programs(0) + tl.program_id(0)
    offset = tl.arange(0, BLOCK).to(tl.int64)[:, None]
    row = tl.program_id(0) * BLOCK + offset
    channel = tl.arange(0, HEAD_DIM)[None, :]
    x_ptr += head // heads * stride_xb + head % heads * stride_xh
    x = tl.load(x_ptr + row * stride_xl + channel, mask=row < length, other=0.0)  # [BLOCK, D]
    x = x.to(tl.float32)
    if CENTERED:
        mean = tl.load(center_ptr + head * HEAD_DIM + channel)
        x = tl.where(row < length, x - mean, 0.0)
    rounded, scale = round_block(x)
    place = place_in_block(tl.arange(0, BLOCK)[:, None], channel, HEAD_DIM, 1, SWIZZLED)
    tl.store(integers_ptr + block * (BLOCK * HEAD_DIM) + place, rounded)
    tl.store(scales_ptr + block, scale)


@launched
@triton.jit(do_not_specialize=["length", "heads"])
def channel_max_kernel(
    v_ptr, amax_ptr, length, heads, stride_vb, stride_vl, stride_vh,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    channel = tl.arange(0, HEAD_DIM)
    v_ptr += head // heads * stride_vb + head % heads * stride_vh
    v = tl.load(v_ptr + row * stride_vl + channel[None, :], mask=row < length, other=0.0)
    part = head * tl.num_programs(0) + tl.program_id(0)
    tl.store(amax_ptr + part * HEAD_DIM + channel, largest(tl.abs(v.to(tl.float32)), 0))


@launched
@triton.jit(do_not_specialize=["length", "heads"])
def quantize_values_kernel(
    v_ptr, amax_ptr, values_ptr, scales_ptr, length, heads, limit, per_limit,
    stride_vb, stride_vl, stride_vh,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, ITEM: tl.constexpr, CUT: tl.constexpr,
    SWIZZLED: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, HEAD_DIM)
    amax = larger(tl.load(amax_ptr + head * HEAD_DIM + channel), 1e-8)  # [D]
    if tl.program_id(0) == 0:
        tl.store(scales_ptr + head * HEAD_DIM + channel, amax * per_limit)
    v_ptr += head // heads * stride_vb + head % heads * stride_vh
    values_ptr += head * tl.num_programs(0) * (HEAD_DIM * BLOCK)
    quantize_block_of_values(
        v_ptr, values_ptr, amax, tl.program_id(0), length, limit, stride_vl,
        BLOCK, HEAD_DIM, ITEM, CUT, SWIZZLED, EIGHTS,
    )  # fmt: skip


@triton.jit
def quantize_block_of_values(
    v_ptr, values_ptr, amax, block, length, limit, stride_vl,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, ITEM: tl.constexpr, CUT: tl.constexpr,
    SWIZZLED: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """Write a block of a head's values [L, D], so that amax [D] becomes `limit`."""
    offset = tl.arange(0, BLOCK)
    key = offset
    if SWIZZLED and ITEM == 1:
        # Of 32 keys a thread holds the weights of 2 in each 8, and multiplies 4 and 4 at once.
        key = offset // 16 * 16 + offset // 2 % 2 * 8 + offset // 4 % 4 * 2 + offset % 2
    row = block * BLOCK + key.to(tl.int64)[:, None]
    channel = tl.arange(0, HEAD_DIM)
    v = tl.load(v_ptr + row * stride_vl + channel[None, :], mask=row < length, other=0.0)
    factor = tl.div_rn(tl.full([HEAD_DIM], 1.0, tl.float32), amax) * limit
    scaled = tl.clamp(v.to(tl.float32) * factor[None, :], -limit, limit)
    scaled = rounded_once(scaled, values_ptr.dtype.element_ty, CUT)
    column = channel
    if EIGHTS:
        # Of 32 columns thread t of four gets 2 t and 2 t + 1 of each 8: channels 8 t and on.
        column = channel // 32 * 32 + channel % 8 // 2 * 8 + channel // 8 % 4 * 2 + channel % 2
    place = place_in_block(column[:, None], offset[None, :], BLOCK, ITEM, SWIZZLED)
    values_ptr += tl.cast(block, tl.int64) * (HEAD_DIM * BLOCK)
    tl.store(values_ptr + place, tl.trans(scaled))  # [D, BLOCK]


@triton.jit
def some_row(place, count, length):
    """The row at this place of `count` rows that stand for all: all of them, or some by the golden
    ratio, as steps of one length would meet a video in a single column."""
    place = place.to(tl.int64)
    spread = (place * 2654435769 & 0xFFFFFFFF) * length >> 32
    return tl.where(count == length, place, spread)


@launched
@triton.jit(do_not_specialize=["count", "length", "heads"])
def sampled_bound_kernel(
    v_ptr, bound_ptr, count, length, heads, stride_vb, stride_vl, stride_vh,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, HEAD_DIM)
    v_ptr += head // heads * stride_vb + head % heads * stride_vh
    bound = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for first in range(0, count, ROWS):
        place = first + tl.arange(0, ROWS)[:, None]
        row = some_row(place, count, length)
        v = tl.load(v_ptr + row * stride_vl + channel[None, :], mask=place < count, other=0.0)
        bound = larger(bound, tl.abs(v.to(tl.float32)))
    bound = larger(TIMES * largest(bound, 0), 1e-8)
    tl.store(bound_ptr + head * HEAD_DIM + channel, bound)


@launched
@triton.jit(do_not_specialize=["length", "heads", "blocks"])
def mend_values_kernel(
    v_ptr, amax_ptr, bound_ptr, values_ptr, scales_ptr, length, heads, blocks, limit, per_limit,
    stride_vb, stride_vl, stride_vh,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, ITEM: tl.constexpr, CUT: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, HEAD_DIM)
    amax = larger(tl.load(amax_ptr + head * HEAD_DIM + channel), 1e-8)  # [D]
    bound = tl.load(bound_ptr + head * HEAD_DIM + channel)
    reached = tl.where(amax <= bound, bound, amax)  # NaN exceeds
    exceeding = tl.sum(tl.where(amax <= bound, 0, 1))
    if tl.program_id(0) == 0:
        tl.store(scales_ptr + head * HEAD_DIM + channel, reached * per_limit)
    if exceeding > 0:
        v_ptr += head // heads * stride_vb + head % heads * stride_vh
        values_ptr += head * blocks * (HEAD_DIM * BLOCK)
        for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
            quantize_block_of_values(
                v_ptr, values_ptr, reached, block, length, limit, stride_vl,
                BLOCK, HEAD_DIM, ITEM, CUT, True, EIGHTS,
            )  # fmt: skip


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int,
    block_k: int,
    out: torch.Tensor,
    add: bool,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over the selected key blocks, written or added to `out` [B, L, H, D].

    `lse`, if given, takes the logarithm to base 2 of each row's sum, float32 [B, H, L].
    """
    batch, length, heads, dim = q.shape
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    tma = has_tma(q.device) and in_steps_of_16_bytes(k) and in_steps_of_16_bytes(v)
    if tma:
        k, v = map_of_rows(k, block_k), map_of_rows(v, block_k)
    with launching_on(q):
        sparse_attention_kernel[block_map.shape[2], heads, batch](
            q, k, v, block_map.contiguous(), out, out if lse is None else lse,
            length, block_map.shape[3], score_scale(q), *strides,
            HEAD_DIM=dim, BLOCK_Q=block_q, BLOCK_K=block_k,
            ADD=add, LSE=lse is not None, TMA=tma,
            **attention_launch(capability(out.device), "16 bit", block_q, block_k),
        )  # fmt: skip
    return out


def sage_attention(
    operands: Quantized, block_map: torch.Tensor, out: torch.Tensor, add: bool
) -> torch.Tensor:
    """The same on quantized operands, of blocks as long as those operands have them."""
    batch, length, heads, dim = out.shape
    block_q = operands.q.shape[2] // operands.q_scale.shape[2]
    block_k = operands.v.shape[-1]
    fp8 = operands.v.dtype == torch.float8_e4m3fn
    tma = has_tma(out.device)
    if tma:
        keys, values = map_of_blocks(operands.k, block_k), map_of_blocks(operands.v, dim)
        operands = operands._replace(k=keys, v=values)
    with launching_on(out):
        sage_attention_kernel[block_map.shape[2], heads, batch](
            *operands, block_map.contiguous(), out, length, block_map.shape[3],
            HEAD_DIM=dim, BLOCK_Q=block_q, BLOCK_K=block_k, FP8=fp8, TMA=tma, ADD=add,
            CUT=cuts_e4m3(out.device),
            **attention_launch(
                capability(out.device), "fp8" if fp8 else "fp16", block_q, block_k
            ),
        )  # fmt: skip
    return out


def cuts_e4m3(device: torch.device) -> bool:
    """Whether Triton makes e4m3 of float16, and that of float32 by cutting it off: on sm_89.

    So do Triton 3.6 and 3.8. One number in 250 then rounds to its other neighbour.
    """
    return capability(device) == (8, 9) and not interpreting()


def map_of_blocks(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Tensor map of x [..., D] as blocks of `rows` rows, one after another."""
    columns = x.shape[-1]
    return TensorDescriptor.from_tensor(x.view(-1, columns), [rows, columns])


def map_of_rows(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """Tensor map of x [B, L, H, D] as [B, H, L, D], `rows` rows of one head at a time; zeros past
    the end."""
    return TensorDescriptor.from_tensor(x.transpose(1, 2), [1, 1, rows, x.shape[-1]])


def quantize(
    q: torch.Tensor | Int8Blocks,
    k: torch.Tensor,
    v: torch.Tensor,
    k_mean: torch.Tensor,
    v_dtype: torch.dtype,
    block_q: int,
    block_k: int,
    v_max: torch.Tensor | None = None,
    swizzled: bool = False,
    limit: float = VALUE_LIMIT,
    eights: bool = False,
) -> Quantized:
    """q and k - k_mean in int8 with a scale per block, v with a scale per channel.

    `swizzled` lays k and v out as hopper.py says, and `eights` v's channels; v's largest number
    becomes `limit`.
    """
    q_int, q_scale = q if isinstance(q, Int8Blocks) else quantize_heads(q, block_q)
    keys = quantize_keys(k, block_k, k_mean, swizzled)
    values = quantize_values(v, v_dtype, block_k, v_max, swizzled, limit, eights=eights)
    return Quantized(q_int, q_scale * score_scale(k), *keys, *values)


def quantize_keys(
    k: torch.Tensor, block: int, k_mean: torch.Tensor, swizzled: bool = False
) -> Int8Blocks:
    """k - k_mean in int8 with a scale per block."""
    return quantize_heads(k, block, k_mean.float().contiguous(), swizzled)


def quantize_heads(
    x: torch.Tensor, block: int, center: torch.Tensor | None = None, swizzled: bool = False
) -> Int8Blocks:
    """x [B, L, H, D] less `center` [B, H, D] in int8, in blocks of rows of one head."""
    batch, length, heads, dim = x.shape
    blocks = -(-length // block)
    integers = torch.empty(batch, heads, blocks * block, dim, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    centered = center is not None
    quantize_heads_kernel[blocks, batch * heads](
        x, center if centered else x, integers, scales, length, heads, *x.stride()[:3],
        BLOCK=block, HEAD_DIM=dim, CENTERED=centered, SWIZZLED=swizzled, **LAUNCH,
    )  # fmt: skip
    return Int8Blocks(integers, scales)


def quantize_values(
    v: torch.Tensor,
    dtype: torch.dtype,
    block: int,
    v_max: torch.Tensor | None = None,
    swizzled: bool = False,
    limit: float = VALUE_LIMIT,
    out: torch.Tensor | None = None,
    eights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """v to `dtype` [B, H, N, D, block], to a contiguous `out` if there is one, and float32
    [B, H, D], one scale per channel."""
    batch, length, heads, dim = v.shape
    blocks = -(-length // block)
    shape = batch, heads, blocks, dim, block
    values = torch.empty(*shape, dtype=dtype, device=v.device) if out is None else out
    scales = torch.empty(batch, heads, dim, dtype=torch.float32, device=v.device)
    amax = channel_max(v, block) if v_max is None else v_max.contiguous()  # [B, H, D]
    quantize_values_kernel[blocks, batch * heads](
        v, amax, values, scales, length, heads, limit, 1 / limit, *v.stride()[:3],
        BLOCK=block, HEAD_DIM=dim, ITEM=values.itemsize, SWIZZLED=swizzled, EIGHTS=eights,
        CUT=cuts_e4m3(v.device), **LAUNCH,
    )  # fmt: skip
    return values, scales


def sampled_bound(v: torch.Tensor) -> torch.Tensor:
    """A bound of |v|, [B, L, H, D], from a sample of rows, float32 [B, H, D]: a multiple of the
    largest."""
    batch, length, heads, dim = v.shape
    bound = torch.empty(batch, heads, dim, dtype=torch.float32, device=v.device)
    sampled_bound_kernel[(batch * heads,)](
        v, bound, min(SOME_ROWS, length), length, heads, *v.stride()[:3],
        ROWS=ROWS_AT_ONCE, HEAD_DIM=dim, TIMES=HEADROOM, **SOME_LAUNCH,
    )  # fmt: skip
    return bound


def mend_values(
    v: torch.Tensor,
    amax: torch.Tensor,
    bound: torch.Tensor,
    values: torch.Tensor,
    limit: float = VALUE_LIMIT,
    eights: bool = False,
) -> torch.Tensor:
    """The scales [B, H, D] of values [B, H, N, D, 64], swizzled, made of v [B, L, H, D] so that
    `bound` [B, H, D] became `limit`; channels where amax [B, H, D], max |v|, is higher are made
    again. `eights`: see `quantize`."""
    batch, length, heads, dim = v.shape
    blocks, block = values.shape[2], values.shape[4]
    scales = torch.empty_like(bound)
    mend_values_kernel[-(-blocks // MENDED), batch * heads](
        v, amax, bound, values, scales, length, heads, blocks, limit, 1 / limit,
        *v.stride()[:3], BLOCK=block, HEAD_DIM=dim, ITEM=values.itemsize, EIGHTS=eights,
        CUT=cuts_e4m3(v.device), **LAUNCH,
    )  # fmt: skip
    return scales


def channel_max(v: torch.Tensor, rows: int) -> torch.Tensor:
    """max |v| over L, float32 [B, H, D]."""
    batch, length, heads, dim = v.shape
    parts = -(-length // rows)
    amax = torch.empty(batch, heads, parts, dim, dtype=torch.float32, device=v.device)
    channel_max_kernel[parts, batch * heads](
        v, amax, length, heads, *v.stride()[:3], ROWS=rows, HEAD_DIM=dim, **LAUNCH
    )
    return amax.amax(2)
