"""Block means and block selection in Triton."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..dispatch import capability
from ..launching import launched
from ..tuning import SELECT_BLOCKS, of_card

RESIDENT = 2048  # scores of a row that two warps hold in their registers; 1182 at 720p
FEW = 512  # those of a shorter row, in a quarter of the time; 512 at 480p
CHUNK = 1024  # scores that one step of the selection of longer rows looks at
TILE = 64  # query and key blocks of one score tile; blocks that are centered at a time
SCORES = 2**23  # of some heads, that are there at once; 12 heads of 40 at 720p
CHANNELS = 32  # that one program centers
LAUNCH = {"num_warps": 4, "num_stages": 1}  # memory-bound or tiny, the same on every card


@launched
@triton.jit(do_not_specialize=["length", "heads"])
def block_means_kernel(
    x_ptr, means_ptr, length, heads, stride_xb, stride_xl, stride_xh,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    row = first + tl.arange(0, BLOCK)
    channel = tl.arange(0, HEAD_DIM)
    x_ptr += head // heads * stride_xb + head % heads * stride_xh
    x = tl.load(
        x_ptr + row[:, None] * stride_xl + channel[None, :], mask=row[:, None] < length, other=0.0
    )  # [BLOCK, D]
    rows = tl.minimum(length - first, BLOCK).to(tl.float32)
    mean = tl.sum(x.to(tl.float32), 0) / rows  # [D]
    block = head * tl.num_programs(0) + tl.program_id(0)
    tl.store(means_ptr + block * HEAD_DIM + channel, mean)


@launched
@triton.jit(do_not_specialize=["length", "blocks"])
def center_means_kernel(
    means_ptr, centered_ptr, mean_ptr, length, blocks,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    means_ptr += head * blocks * HEAD_DIM + channel[None, :]
    centered_ptr += head * blocks * HEAD_DIM + channel[None, :]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)  # [ROWS, C]
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)[:, None]
        rows = tl.minimum(length - block * BLOCK, BLOCK).to(tl.float32)  # the last block has fewer
        total += tl.load(means_ptr + block * HEAD_DIM, mask=block < blocks, other=0.0) * rows
    mean = tl.sum(total, 0) / length  # [C]
    tl.store(mean_ptr + head * HEAD_DIM + channel, mean)
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)[:, None]
        means = tl.load(means_ptr + block * HEAD_DIM, mask=block < blocks, other=0.0)  # [ROWS, C]
        tl.store(centered_ptr + block * HEAD_DIM, means - mean[None, :], mask=block < blocks)


@launched
@triton.jit(do_not_specialize=["n_queries", "n_keys"])
def scores_kernel(
    q_means_ptr, k_means_ptr, scores_ptr, n_queries, n_keys,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * TILE + tl.arange(0, TILE)
    key = tl.program_id(1) * TILE + tl.arange(0, TILE)
    scores = tl.zeros((TILE, TILE), tl.float32)  # [queries, keys]
    for first in range(0, HEAD_DIM, 32):
        channel = first + tl.arange(0, 32)[None, :]
        q = tl.load(
            q_means_ptr + (head * n_queries + query[:, None]) * HEAD_DIM + channel,
            mask=query[:, None] < n_queries, other=0.0,
        )  # [TILE, 32]  # fmt: skip
        k = tl.load(
            k_means_ptr + (head * n_keys + key[:, None]) * HEAD_DIM + channel,
            mask=key[:, None] < n_keys, other=0.0,
        )  # [TILE, 32]  # fmt: skip
        # Three tf32 products, nearly as exact as fp32: one would reorder blocks of close scores.
        scores = tl.dot(q, tl.trans(k), scores, input_precision="tf32x3")
    tl.store(
        scores_ptr + (head * n_queries + query[:, None]) * n_keys + key[None, :], scores,
        mask=(query[:, None] < n_queries) & (key[None, :] < n_keys),
    )  # fmt: skip


@triton.jit
def ordered_keys(scores_ptr, index, n_keys):
    """Integers in the order of the scores; both zeros get the same one."""
    score = tl.load(scores_ptr + index, mask=index < n_keys, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def select_row(scores_ptr, block_map_ptr, n_keys, count, RESIDENT: tl.constexpr):
    """Select of the n_keys scores of this program's row, at most RESIDENT."""
    octave: tl.constexpr = 2**23  # between the integers of a score and of half of it
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, RESIDENT)
    inside = index < n_keys
    # No threshold below is as low as the filling.
    key = tl.where(inside, ordered_keys(scores_ptr + row * n_keys, index, n_keys), -(2**31))
    # The largest threshold that `count` scores reach, or any that just as many do.
    low = tl.full((), -(2**31), tl.int64)
    high = tl.max(key, 0).to(tl.int64)
    reached = n_keys
    # It is looked for a factor of 2 below the best score, then of 8, and so on; then by halves: in
    # at most 39 turns, so `step` never overflows.
    step = tl.full((), octave, tl.int64)
    while (low < high) & (reached != count):
        middle = tl.maximum((low + high + 1) >> 1, high - step)
        step *= 2
        reach = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 0)
        enough = reach >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        reached = tl.where(enough, reach, reached)
    best = low.to(tl.int32)
    taken = (key >= best) & inside
    if reached != count:  # of what ties at the threshold, the first
        ties = count - tl.sum((key > best).to(tl.int32), 0)
        tie = ((key == best) & inside).to(tl.int32)
        taken = (key > best) | ((tie > 0) & (tl.cumsum(tie, 0) <= ties))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(block_map_ptr + row * count + place, index, mask=taken)


@launched
@triton.jit(do_not_specialize=["n_keys", "count"])
def select_resident_kernel(
    scores_ptr, block_map_ptr, n_keys, count, RESIDENT: tl.constexpr, FEW: tl.constexpr
):
    # In one kernel: another resolution must not compile another one.
    if n_keys <= FEW:
        select_row(scores_ptr, block_map_ptr, n_keys, count, FEW)
    else:
        select_row(scores_ptr, block_map_ptr, n_keys, count, RESIDENT)


@triton.jit
def count_from(scores_ptr, threshold, n_keys, CHUNK: tl.constexpr):
    """How many scores have an integer of at least `threshold`."""
    found = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, n_keys, CHUNK):
        index = first + tl.arange(0, CHUNK)
        key = ordered_keys(scores_ptr, index, n_keys)
        found += ((key >= threshold) & (index < n_keys)).to(tl.int32)
    return tl.sum(found, 0)


@launched
@triton.jit(do_not_specialize=["n_keys", "count"])
def select_blocks_kernel(scores_ptr, block_map_ptr, n_keys, count, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * n_keys
    block_map_ptr += row * count
    # The count-th best score is the largest integer that at least `count` scores reach.
    low = tl.full((), -(2**31), tl.int64)
    high = tl.full((), 2**31 - 1, tl.int64)
    for _ in range(32):
        middle = (low + high + 1) >> 1
        enough = count_from(scores_ptr, middle, n_keys, CHUNK) >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    ties = count - count_from(scores_ptr, low + 1, n_keys, CHUNK)
    written = 0
    for first in range(0, n_keys, CHUNK):
        index = first + tl.arange(0, CHUNK)
        key = ordered_keys(scores_ptr, index, n_keys)
        tie = ((key == low) & (index < n_keys)).to(tl.int32)
        taken = (key > low) | ((tie > 0) & (tl.cumsum(tie, 0) <= ties))
        taken &= index < n_keys
        place = written + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(block_map_ptr + place, index, mask=taken)
        written += tl.sum(taken.to(tl.int32), 0)
        ties -= tl.sum(tie, 0)


def block_means(x: torch.Tensor, block: int) -> torch.Tensor:
    """Means of [B, L, H, D] over blocks of rows, float32 [B, H, ceil(L / block), D]."""
    batch, length, heads, dim = x.shape
    blocks = -(-length // block)
    means = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device)
    block_means_kernel[blocks, batch * heads](
        x, means, length, heads, *x.stride()[:3], BLOCK=block, HEAD_DIM=dim, **LAUNCH
    )
    return means


def center_means(means: torch.Tensor, length: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [B, H, N, D] of blocks of rows less the mean of all rows, and that [B, H, D]."""
    batch, heads, blocks, dim = means.shape
    centered = torch.empty_like(means, memory_format=torch.contiguous_format)
    mean = torch.empty(batch, heads, dim, dtype=torch.float32, device=means.device)
    center_means_kernel[batch * heads, dim // CHANNELS](
        means.contiguous(), centered, mean, length, blocks,
        BLOCK=block, HEAD_DIM=dim, ROWS=TILE, CHANNELS=CHANNELS, **LAUNCH,
    )  # fmt: skip
    return centered, mean


def select_rows(scores: torch.Tensor, block_map: torch.Tensor) -> None:
    """Fill block_map [H, NQ, count] with the best of the scores [H or more, NQ, NK]."""
    (heads, queries, count), n_keys = block_map.shape, scores.shape[2]
    rows = (heads * queries,)
    if n_keys <= RESIDENT:
        select_resident_kernel[rows](
            scores, block_map, n_keys, count, RESIDENT=RESIDENT, FEW=FEW,
            **of_card(SELECT_BLOCKS, capability(scores.device)),
        )  # fmt: skip
    else:
        select_blocks_kernel[rows](scores, block_map, n_keys, count, CHUNK=CHUNK, **LAUNCH)


def score_blocks(q: torch.Tensor, k: torch.Tensor, scores: torch.Tensor) -> None:
    """Fill scores [H or more, NQ, NK] with the products of means q [H, NQ, D] and k [H, NK, D]."""
    heads, n_queries, dim = q.shape
    n_keys = k.shape[1]
    tiles = -(-n_queries // TILE), -(-n_keys // TILE), heads
    scores_kernel[tiles](q, k, scores, n_queries, n_keys, HEAD_DIM=dim, TILE=TILE, **LAUNCH)


def select_blocks(
    q_means: torch.Tensor,
    k_means: torch.Tensor,
    count: int,
    select: Callable[[torch.Tensor, torch.Tensor], None] = select_rows,
    score: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] = score_blocks,
) -> torch.Tensor:
    """Indices of the `count` best scores per row, int32 ascending; ties go to the lower index."""
    batch, heads, n_queries, _ = q_means.shape
    n_keys = k_means.shape[2]
    options = {"device": q_means.device}
    block_map = torch.empty(batch * heads, n_queries, count, dtype=torch.int32, **options)
    at_once = min(max(SCORES // (n_queries * n_keys), 1), batch * heads)
    scores = torch.empty(at_once, n_queries, n_keys, dtype=torch.float32, **options)
    given = q_means.contiguous().flatten(0, 1), k_means.contiguous().flatten(0, 1), block_map
    parts = [[x] if at_once == batch * heads else x.split(at_once) for x in given]
    for q, k, selected in zip(*parts, strict=True):
        score(q, k, scores)
        select(scores, selected)
    return block_map.view(batch, heads, n_queries, count)
