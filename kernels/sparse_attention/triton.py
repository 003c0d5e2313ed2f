"""Block-sparse attention in Triton: one program per query block and head."""

import torch
import triton
import triton.language as tl

from ..dispatch import capability
from ..linear_attention import LinearBranch
from ..linear_attention.triton import add_linear_branch, project_state
from .reference import LOG2_E, VALUE_LIMIT, Quantized

LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0))  # 163 KB a block or more; 99 KB elsewhere
LAUNCH = {"num_warps": 8, "num_stages": 1}  # of what only moves data, the same on every card


@triton.jit
def soft_weights(scores, scale, row_max, SHIFT: tl.constexpr):
    """2^(scale * scores - m + SHIFT), the new maximum m, and the factor of all sums so far."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - (new_max - SHIFT)[:, None])
    return weights, new_max, tl.exp2(row_max - new_max)


@triton.jit
def mask_end(scores, first, length, BLOCK_K: tl.constexpr):
    """Hide the keys past the end; only the key block that L cuts short has any."""
    if first + BLOCK_K > length:
        key = first + tl.arange(0, BLOCK_K)
        scores = tl.where(key[None, :] < length, scores, float("-inf"))
    return scores


@triton.jit(do_not_specialize=["heads", "length", "count", "scale"])
def sparse_attention_kernel(
    q, k, v, block_map, out, mix, normalizer, bias,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, heads, length, count, scale,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    LINEAR: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    sample = head // heads
    q += sample * q_b + head % heads * q_h
    k += sample * k_b + head % heads * k_h
    v += sample * v_b + head % heads * v_h
    block_map += (head * tl.num_programs(0) + tl.program_id(0)) * count
    # Rows stay int32 while the loop runs: twice the width would spill registers.
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None, :]
    tile = tl.load(q + row.to(tl.int64) * q_l + channel, mask=row < length, other=0.0)
    acc = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    for i in range(count):
        first = tl.load(block_map + i).to(tl.int64) * BLOCK_K
        # Past the end the last key is read again, so that no load needs a mask.
        key = tl.minimum(tl.arange(0, BLOCK_K), (length - 1 - first).to(tl.int32))[:, None]
        keys = tl.load(k + first * k_l + (key * k_l + channel))  # [BLOCK_K, D]
        scores = tl.dot(tile, tl.trans(keys))  # [BLOCK_Q, BLOCK_K]
        scores = mask_end(scores, first, length, BLOCK_K)
        values = tl.load(v + first * v_l + (key * v_l + channel))  # [BLOCK_K, D]
        weights, row_max, factor = soft_weights(scores, scale, row_max, 0)
        row_sum = row_sum * factor + tl.sum(weights, 1)
        acc = acc * factor[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc)
    result = acc / row_sum[:, None]
    if LINEAR:
        result = add_linear_branch(
            result, q, q_l, row, length, head, mix, normalizer, bias, HEAD_DIM, FEATURE_MAP
        )
    place = ((sample * length + row) * heads + head % heads) * HEAD_DIM + channel
    tl.store(out + place, result.to(out.dtype.element_ty), mask=row < length)


@triton.jit(do_not_specialize=["heads", "length", "count"])
def sage_attention_kernel(
    q, q_int, q_scale, k_int, k_scale, v, v_scale, block_map, out,
    mix, normalizer, bias, q_b, q_l, q_h, heads, length, count,
    HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SHIFT: tl.constexpr,
    LINEAR: tl.constexpr, FEATURE_MAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    sample = head // heads
    q_block = head * tl.num_programs(0) + tl.program_id(0)
    k_blocks = tl.cdiv(length, BLOCK_K)
    k_int += head * k_blocks * BLOCK_K * HEAD_DIM
    k_scale += head * k_blocks
    v += head * k_blocks * BLOCK_K * HEAD_DIM
    block_map += q_block * count
    offset = tl.arange(0, BLOCK_Q)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None, :]
    tile = tl.load(q_int + (q_block * BLOCK_Q + offset) * HEAD_DIM + channel)  # [BLOCK_Q, D]
    tile_scale = tl.load(q_scale + q_block)
    acc = tl.zeros((BLOCK_Q, HEAD_DIM), tl.float32)
    row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    key = tl.arange(0, BLOCK_K)
    for i in range(count):
        block = tl.load(block_map + i).to(tl.int64)
        first = block * BLOCK_K
        keys = tl.load(k_int + first * HEAD_DIM + (key[:, None] * HEAD_DIM + channel))
        scores = tl.dot(tile, tl.trans(keys)).to(tl.float32)  # [BLOCK_Q, BLOCK_K]
        scores = mask_end(scores, first, length, BLOCK_K)
        scale = tile_scale * tl.load(k_scale + block)
        values = tl.load(v + first * HEAD_DIM + (tl.trans(channel) * BLOCK_K + key[None, :]))
        weights, row_max, factor = soft_weights(scores, scale, row_max, SHIFT)
        rounded = weights.to(values.dtype)
        row_sum = row_sum * factor + tl.sum(rounded.to(tl.float32), 1)
        acc = acc * factor[:, None]
        # Hopper's fp8 sums drop low bits: 64 keys at most, the rest is added in fp32.
        acc = tl.dot(rounded, tl.trans(values), acc, max_num_imprecise_acc=64)
    result = acc / row_sum[:, None] * tl.load(v_scale + head * HEAD_DIM + channel)
    row = tl.program_id(0) * BLOCK_Q + offset
    if LINEAR:
        q += sample * q_b + head % heads * q_h
        result = add_linear_branch(
            result, q, q_l, row, length, head, mix, normalizer, bias, HEAD_DIM, FEATURE_MAP
        )
    place = ((sample * length + row) * heads + head % heads) * HEAD_DIM + channel
    tl.store(out + place, result.to(out.dtype.element_ty), mask=row < length)


@triton.jit(do_not_specialize=["heads", "length", "factor"])
def quantize_heads_kernel(
    x, center, integers, scales, stride_b, stride_l, stride_h, heads, length, factor,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    block = head * tl.num_programs(0) + tl.program_id(0)
    offset = tl.arange(0, BLOCK).to(tl.int64)[:, None]
    row = tl.program_id(0) * BLOCK + offset
    channel = tl.arange(0, HEAD_DIM)[None, :]
    x += head // heads * stride_b + head % heads * stride_h
    tile = tl.load(x + row * stride_l + channel, mask=row < length, other=0.0).to(tl.float32)
    if CENTERED:
        mean = tl.load(center + head * HEAD_DIM + channel)
        tile = tl.where(row < length, tile - mean, 0.0)  # [BLOCK, D]
    amax = tl.maximum(tl.max(tl.abs(tile)), 1e-8)
    # Clamped before the sum below, so that no FMA can skip the rounding of the product.
    full_scale = tl.full(amax.shape, 127.0, tl.float32)
    scaled = tl.clamp(tile * tl.div_rn(full_scale, amax), -127.0, 127.0)
    # Adding 1.5 * 2^23 leaves no bit for the fraction, and fp32 additions round half to even.
    rounded = ((scaled + 12582912.0) - 12582912.0).to(tl.int8)
    tl.store(integers + (block * BLOCK + offset) * HEAD_DIM + channel, rounded)
    tl.store(scales + block, tl.div_rn(amax, full_scale) * factor)


@triton.jit(do_not_specialize=["heads", "length"])
def channel_max_kernel(
    v, amax, stride_b, stride_l, stride_h, heads, length,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    channel = tl.arange(0, HEAD_DIM)
    v += head // heads * stride_b + head % heads * stride_h
    tile = tl.load(v + row * stride_l + channel[None, :], mask=row < length, other=0.0)
    part = head * tl.num_programs(0) + tl.program_id(0)
    tl.store(amax + part * HEAD_DIM + channel, tl.max(tl.abs(tile.to(tl.float32)), 0))


@triton.jit(do_not_specialize=["heads", "length"])
def quantize_values_kernel(
    v, factors, values, stride_b, stride_l, stride_h, heads, length, limit,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    block = head * tl.num_programs(0) + tl.program_id(0)
    offset = tl.arange(0, BLOCK)
    row = tl.program_id(0) * BLOCK + offset.to(tl.int64)[:, None]
    channel = tl.arange(0, HEAD_DIM)
    v += head // heads * stride_b + head % heads * stride_h
    tile = tl.load(v + row * stride_l + channel[None, :], mask=row < length, other=0.0)
    factor = tl.load(factors + head * HEAD_DIM + channel)[None, :]
    scaled = tl.clamp(tile.to(tl.float32) * factor, -limit, limit).to(values.dtype.element_ty)
    place = (block * HEAD_DIM + channel[:, None]) * BLOCK + offset[None, :]
    tl.store(values + place, tl.trans(scaled))  # [D, BLOCK]


def float_config(capability: tuple[int, int], block_q: int, block_k: int) -> dict[str, int]:
    """Launch configuration of `sparse_attention_kernel`."""
    stages = 3 if capability in LARGE_SHARED_MEMORY and block_k == 64 else 2
    return {"num_warps": block_q * block_k // 1024, "num_stages": stages}


def low_bit_config(capability: tuple[int, int], block_q: int, block_k: int) -> dict[str, int]:
    """Launch configuration of `sage_attention_kernel`."""
    stages = 4 if capability in LARGE_SHARED_MEMORY else 3
    warps = block_q * block_k // 1024
    return {"num_warps": warps, "num_stages": 2 if block_k == 128 else stages}


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    linear: LinearBranch | None,
) -> torch.Tensor:
    """Softmax attention over the selected key blocks, [B, L, H, D]."""
    batch, length, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    branch, flags = linear_arguments(q, linear)
    with torch.cuda.device_of(q):
        sparse_attention_kernel[block_map.shape[2], batch * heads](
            q, k, v, block_map.contiguous(), out, *branch,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            heads, length, block_map.shape[3], scale * LOG2_E,
            HEAD_DIM=dim, BLOCK_Q=block_q, BLOCK_K=block_k, **flags,
            **float_config(capability(q.device), block_q, block_k),
        )  # fmt: skip
    return out


def sage_attention(
    q: torch.Tensor,
    operands: Quantized,
    block_map: torch.Tensor,
    block_q: int,
    block_k: int,
    linear: LinearBranch | None,
) -> torch.Tensor:
    """The same on quantized operands; q itself is read by the linear branch only."""
    batch, length, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    branch, flags = linear_arguments(q, linear)
    fp8 = operands.v.dtype == torch.float8_e4m3fn
    with torch.cuda.device_of(q):
        sage_attention_kernel[block_map.shape[2], batch * heads](
            q, *operands, block_map.contiguous(), out, *branch,
            *q.stride()[:3], heads, length, block_map.shape[3],
            HEAD_DIM=dim, BLOCK_Q=block_q, BLOCK_K=block_k, SHIFT=8 if fp8 else 0, **flags,
            **low_bit_config(capability(q.device), block_q, block_k),
        )  # fmt: skip
    return out


def linear_arguments(q: torch.Tensor, linear: LinearBranch | None) -> tuple[tuple, dict]:
    """The kernels' tensors and flags for a linear branch; stand-ins where there is none."""
    if linear is None:
        return (q, q, q), {"LINEAR": False, "FEATURE_MAP": "softmax"}
    mix = project_state(linear.state, linear.normalizer, linear.proj_weight, q.dtype)
    tensors = mix, linear.normalizer.contiguous(), linear.proj_bias.contiguous()
    return tensors, {"LINEAR": True, "FEATURE_MAP": linear.feature_map}


def quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_mean: torch.Tensor,
    v_dtype: torch.dtype,
    block_q: int,
    block_k: int,
    scale: float,
) -> Quantized:
    """q and k - k_mean in int8 with a scale per block, v with a scale per channel."""
    q_int, q_scale = quantize_blocks(q, block_q, scale * LOG2_E)
    k_int, k_scale = quantize_blocks(k, block_k, 1.0, k_mean.float().contiguous())
    values, v_scale = quantize_values(v, v_dtype, block_k)
    return Quantized(q_int, q_scale, k_int, k_scale, values, v_scale)


def quantize_blocks(
    x: torch.Tensor, block: int, factor: float, center: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x - center to int8 [B, H, N * block, D]; scales times `factor`, float32 [B, H, N]."""
    batch, length, heads, dim = x.shape
    blocks = triton.cdiv(length, block)
    integers = torch.empty(
        batch, heads, blocks * block, dim, dtype=torch.int8, device=x.device
    )
    scales = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    centered = center is not None
    with torch.cuda.device_of(x):
        quantize_heads_kernel[blocks, batch * heads](
            x, center if centered else x, integers, scales, *x.stride()[:3], heads, length,
            factor, BLOCK=block, HEAD_DIM=dim, CENTERED=centered,
            **LAUNCH,
        )  # fmt: skip
    return integers, scales


def quantize_values(
    v: torch.Tensor, dtype: torch.dtype, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """v to `dtype` [B, H, N, D, block] and float32 [B, H, D], one scale per channel."""
    batch, length, heads, dim = v.shape
    blocks = triton.cdiv(length, block)
    grid = blocks, batch * heads
    parts = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=v.device)
    values = torch.empty(batch, heads, blocks, dim, block, dtype=dtype, device=v.device)
    with torch.cuda.device_of(v):
        channel_max_kernel[grid](
            v, parts, *v.stride()[:3], heads, length, ROWS=block, HEAD_DIM=dim, **LAUNCH
        )
        amax = parts.amax(2).clamp_min(1e-8)  # [B, H, D]
        quantize_values_kernel[grid](
            v, VALUE_LIMIT / amax, values, *v.stride()[:3], heads, length, VALUE_LIMIT,
            BLOCK=block, HEAD_DIM=dim, **LAUNCH,
        )  # fmt: skip
    return values, amax / VALUE_LIMIT
