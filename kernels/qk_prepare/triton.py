"""What prepares q and k in Triton: the rows' norms in one pass, all the rest in a second one."""

import torch
import triton
import triton.language as tl

from ..launching import launched
from ..linear_attention import LinearBranch
from ..linear_attention.triton import linear_attention
from ..sparse_attention.triton import SOME_ROWS, round_block, some_row

HEADS = 8  # of one program, which reads its cosines from memory once
NORM_ROWS = 128  # of a program that adds up their squares
MEAN_ROWS = 64  # of some that a program takes at a time
MEAN_LAUNCH = {"num_warps": 8, "num_stages": 2}
ROW_LAUNCH = {"num_warps": 4, "num_stages": 1}  # bandwidth-bound, the same on every card


@triton.jit
def norms_of_parts(squares, channels, eps):
    """1 / root mean square of the rows whose squares add up to squares float [P] or [P, R].

    Sums of float32 are as good as exact in float64: the same in whichever order they come.
    """
    total = tl.sum(squares.to(tl.float64), 0).to(tl.float32)
    return tl.rsqrt(total / channels + eps)


@launched
@triton.jit(do_not_specialize=["length", "heads", "eps"])
def row_norms_kernel(
    x_ptr, norms_ptr, length, heads, eps, stride_xb, stride_xl, stride_xh,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    channel = tl.arange(0, HEAD_DIM)[None, :]
    x_ptr += sample * stride_xb + row * stride_xl
    x = tl.load(x_ptr + head * stride_xh + channel, mask=head < heads, other=0.0)  # [HEADS, D]
    x = x.to(tl.float32)
    norm = norms_of_parts(tl.sum(x * x, 1), heads * HEAD_DIM, eps)  # of heads, as below
    tl.store(norms_ptr + sample * length + row, norm)


@launched
@triton.jit(do_not_specialize=["length", "heads"])
def square_sums_kernel(
    x_ptr, sums_ptr, length, heads, stride_xb, stride_xl, stride_xh,
    HEAD_DIM: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, HEAD_DIM)[None, :]
    x_ptr += sample * stride_xb + row * stride_xl
    place = head[:, None] * stride_xh + channel
    x = tl.load(x_ptr + place, mask=head[:, None] < heads, other=0.0)  # [HEADS, D]
    x = x.to(tl.float32)
    to = sums_ptr + (sample * length + row) * heads + head
    tl.store(to, tl.sum(x * x, 1), mask=head < heads)


@launched
@triton.jit(do_not_specialize=["length", "parts", "channels", "eps"])
def norms_of_squares_kernel(
    squares_ptr, norms_ptr, length, parts, channels, eps, PARTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, PARTS)[:, None]
    inside = row < length
    squares_ptr += (sample * parts + part) * length + row
    squares = tl.load(squares_ptr, mask=(part < parts) & inside, other=0.0)  # [PARTS, ROWS]
    norms = norms_of_parts(squares, channels, eps)
    tl.store(norms_ptr + sample * length + row, norms, mask=inside)


@triton.jit
def rotate(x, cos, sin, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rotate the channel pairs (2i, 2i + 1) of x [R, D] by angles [R, D / 2]."""
    a, b = tl.split(x.reshape(ROWS, HEAD_DIM // 2, 2))
    return tl.join(a * cos - b * sin, a * sin + b * cos).reshape(ROWS, HEAD_DIM)


@launched
@triton.jit(do_not_specialize=["count", "length", "heads"])
def mean_of_some_kernel(
    x_ptr, norms_ptr, weight_ptr, cos_ptr, sin_ptr, mean_ptr, count, length, heads,
    stride_xb, stride_xl, stride_xh, stride_cos_b, stride_cos_l, stride_sin_b, stride_sin_l,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, HEAD_DIM)[None, :]
    pair = tl.arange(0, HEAD_DIM // 2)[None, :]
    x_ptr += sample * stride_xb + head * stride_xh
    cos_ptr += sample * stride_cos_b
    sin_ptr += sample * stride_sin_b
    weight = tl.load(weight_ptr + head * HEAD_DIM + channel)
    total = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for first in range(0, count, ROWS):
        place = first + tl.arange(0, ROWS)[:, None]
        inside, row = place < count, some_row(place, count, length)
        x = tl.load(x_ptr + row * stride_xl + channel, mask=inside, other=0.0)  # [ROWS, D]
        norm = tl.load(norms_ptr + sample * length + row, mask=inside, other=0.0)
        # [ROWS, D / 2] both.
        cos = tl.load(cos_ptr + row * stride_cos_l + pair, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + row * stride_sin_l + pair, mask=inside, other=0.0)
        total += rotate(x.to(tl.float32) * norm * weight, cos, sin, ROWS, HEAD_DIM)
    mean = (tl.sum(total, 0) / count).to(mean_ptr.dtype.element_ty)
    tl.store(mean_ptr + (sample * heads + head) * HEAD_DIM + tl.arange(0, HEAD_DIM), mean)


@launched
@triton.jit(do_not_specialize=["length", "heads"])
def prepare_kernel(
    x_ptr, norms_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, means_ptr, integers_ptr, scales_ptr,
    length, heads, stride_xb, stride_xl, stride_xh,
    stride_cos_b, stride_cos_l, stride_sin_b, stride_sin_l,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    block, blocks = tl.program_id(1), tl.num_programs(1)
    first = block.to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)[:, None]
    inside = offset < length - first
    channel = tl.arange(0, HEAD_DIM)[None, :]
    pair = tl.arange(0, HEAD_DIM // 2)[None, :]
    x_ptr += sample * stride_xb + first * stride_xl
    cos_ptr += sample * stride_cos_b + first * stride_cos_l
    sin_ptr += sample * stride_sin_b + first * stride_sin_l
    out_ptr += (sample * length + first) * heads * HEAD_DIM
    norm = tl.load(norms_ptr + sample * length + first + offset, mask=inside, other=0.0)
    rows = tl.minimum(length - first, BLOCK).to(tl.float32)
    for head in range(tl.program_id(0) * HEADS, tl.minimum((tl.program_id(0) + 1) * HEADS, heads)):
        place = offset * stride_xl + (head * stride_xh + channel)
        # [BLOCK, D]
        x = tl.load(x_ptr + place, mask=inside, other=0.0, eviction_policy="evict_first")
        weight = tl.load(weight_ptr + head * HEAD_DIM + channel).to(tl.float32)
        # Rounded here and below, as by RMSNorm and RoPE one after the other.
        x = (x.to(tl.float32) * norm * weight).to(x_ptr.dtype.element_ty).to(tl.float32)
        # [BLOCK, D / 2] both.
        cos = tl.load(cos_ptr + offset * stride_cos_l + pair, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + offset * stride_sin_l + pair, mask=inside, other=0.0)
        rotated = rotate(x, cos, sin, BLOCK, HEAD_DIM).to(x_ptr.dtype.element_ty)
        tl.store(out_ptr + (offset * heads + head) * HEAD_DIM + channel, rotated, mask=inside)
        x = rotated.to(tl.float32)  # [BLOCK, D]
        part = (sample * heads + head) * blocks + block
        mean = tl.sum(x, 0) / rows
        tl.store(means_ptr + part * HEAD_DIM + tl.arange(0, HEAD_DIM), mean)
        if QUANTIZE:
            rounded, scale = round_block(x)
            tl.store(
                integers_ptr + part * (BLOCK * HEAD_DIM) + offset * HEAD_DIM + channel, rounded
            )
            tl.store(scales_ptr + part, scale)


def config(block: int) -> dict[str, int]:
    """Launch configuration of `prepare_kernel`, the same on every card."""
    return {"num_warps": block // 8, "num_stages": 1}


def contiguous_pairs(angles: torch.Tensor) -> torch.Tensor:
    """cos or sin [B, L, D / 2] with its pairs side by side: every head reads them again."""
    return angles if angles.stride(-1) == 1 else angles.contiguous()


def given_or_own_norms(x: torch.Tensor, eps: float, given: torch.Tensor | None) -> torch.Tensor:
    """1 / root mean square of each row of [B, L, H, D] over all heads, float32 [B, L]."""
    if given is not None:
        return given.contiguous()
    batch, length, heads, dim = x.shape
    norms = torch.empty(batch, length, dtype=torch.float32, device=x.device)
    row_norms_kernel[length, batch](
        x, norms, length, heads, eps, *x.stride()[:3],
        HEAD_DIM=dim, HEADS=heads_of_tile(heads), **ROW_LAUNCH,
    )  # fmt: skip
    return norms


def heads_of_tile(heads: int) -> int:
    """How many a program has a place for. For fewer than 8 a row would be on more threads, which
    add it up in another order."""
    return max(8, 1 << (heads - 1).bit_length())


def square_sums(x: torch.Tensor) -> torch.Tensor:
    """Sums of squares of x [B, L, H, D] by head, float32 [B, L, H]."""
    batch, length, heads, dim = x.shape
    sums = torch.empty(batch, length, heads, dtype=torch.float32, device=x.device)
    square_sums_kernel[length, batch](
        x, sums, length, heads, *x.stride()[:3],
        HEAD_DIM=dim, HEADS=heads_of_tile(heads), **ROW_LAUNCH,
    )  # fmt: skip
    return sums


def norms_of_squares(squares: torch.Tensor, channels: int, eps: float) -> torch.Tensor:
    """1 / root mean square of rows whose squares add up to squares [B, P, L], float32 [B, L]."""
    batch, parts, length = squares.shape
    norms = torch.empty(batch, length, dtype=torch.float32, device=squares.device)
    norms_of_squares_kernel[-(-length // NORM_ROWS), batch](
        squares.contiguous(), norms, length, parts, channels, eps,
        PARTS=1 << (parts - 1).bit_length(), ROWS=NORM_ROWS, **ROW_LAUNCH,
    )  # fmt: skip
    return norms


def mean_of_some(
    x: torch.Tensor,
    norms: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """The mean of at most SOME_ROWS normalized and rotated rows of x [B, L, H, D], in its dtype
    [B, H, D]; norms float32 [B, L], weight float32 [H D]."""
    batch, length, heads, dim = x.shape
    mean = torch.empty(batch, heads, dim, dtype=x.dtype, device=x.device)
    cos, sin = (contiguous_pairs(angles).expand(batch, -1, -1) for angles in (cos, sin))
    mean_of_some_kernel[heads, batch](
        x, norms, weight, cos, sin, mean, min(SOME_ROWS, length), length, heads,
        *x.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
        HEAD_DIM=dim, ROWS=MEAN_ROWS, **MEAN_LAUNCH,
    )  # fmt: skip
    return mean


def block_outputs(
    x: torch.Tensor, block: int, quantize: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Room for what is known of the N blocks of x [B, L, H, D]: means float32 [B, H, N, D] and,
    if asked for, int8 [B, H, N * block, D] with scales float32 [B, H, N]."""
    batch, length, heads, dim = x.shape
    blocks = -(-length // block)
    means = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device)
    if not quantize:
        return means, None, None
    integers = torch.empty(batch, heads, blocks * block, dim, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    return means, integers, scales


def prepare(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    block: int,
    quantize: bool,
    out: torch.Tensor,
    branch: LinearBranch | None,
    row_norms: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The rotated rows or their linear branch to `out`; their means, int8 blocks and scales."""
    batch, length, heads, dim = x.shape
    norms = given_or_own_norms(x, eps, row_norms)
    means, integers, scales = block_outputs(x, block, quantize)
    cos, sin = (contiguous_pairs(angles).expand(batch, -1, -1) for angles in (cos, sin))
    prepare_kernel[-(-heads // HEADS), means.shape[2], batch](
        x, norms, weight.contiguous(), cos, sin, out, means,
        integers if quantize else x, scales if quantize else norms,
        length, heads, *x.stride()[:3], *cos.stride()[:2], *sin.stride()[:2],
        BLOCK=block, HEAD_DIM=dim, HEADS=HEADS, QUANTIZE=quantize, **config(block),
    )  # fmt: skip
    if branch is not None:
        # On its own: within the pass above it would spill on every card but Hopper.
        linear_attention(out, *branch, out)
    return means, integers, scales
