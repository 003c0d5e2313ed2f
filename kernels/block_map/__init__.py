"""Which key blocks each query block attends to (SLA, arXiv 2512.16093, section 1.1)."""

import torch

from ..checks import check_block_size, check_heads, check_shape, not_contiguous
from ..dispatch import choose, has_triton
from . import reference

if has_triton():
    from . import cuda, mma
    from . import triton as triton_kernels
else:
    cuda = mma = triton_kernels = None

__all__ = [
    "block_map",
    "block_means",
    "center_means",
    "centered_means",
    "check_topk",
    "select_blocks",
    "selected_count",
]


def block_means(x: torch.Tensor, block: int, backend: str = "auto") -> torch.Tensor:
    """Means over blocks of rows; the last block averages the rows it has.

    Args:
        x: [B, L, H, D], float32, float16 or bfloat16.
        block: rows in a block, 64 or 128.
        backend: see `dispatch.choose`.

    Returns:
        float32 [B, H, ceil(L / block), D].

    Raises:
        ValueError, TypeError: a shape, block size or dtype does not fit.
    """
    check_heads(x=x)
    check_block_size(block)
    unsupported = (not_contiguous(x),)
    kernels = choose("block_means", backend, x, reference, triton_kernels, unsupported=unsupported)
    return kernels.block_means(x, block)


def centered_means(
    k: torch.Tensor, block: int, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block means of k - mean(k over L), and that mean, in one pass over k.

    Args:
        k: [B, L, H, D], float32, float16 or bfloat16.
        block: rows in a block, 64 or 128.
        backend: see `dispatch.choose`.

    Returns:
        float32 [B, H, ceil(L / block), D] and float32 [B, H, D].
    """
    return center_means(block_means(k, block, backend), k.shape[1], block, backend)


def center_means(
    means: torch.Tensor, length: int, block: int, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block means float32 [B, H, N, D] of `length` rows less the mean of all rows, and that mean
    [B, H, D]; `backend` as for the others."""
    kernels = choose("center_means", backend, means, reference, triton_kernels)
    return kernels.center_means(means, length, block)


def select_blocks(
    q_means: torch.Tensor, k_means: torch.Tensor, count: int, backend: str = "auto"
) -> torch.Tensor:
    """The `count` key blocks with the best scores `q_means k_means^T` of each query block.

    Among equal scores the lower index wins.

    Args:
        q_means: float32 [B, H, NQ, D].
        k_means: float32 [B, H, NK, D].
        count: blocks to select, 1 to NK.
        backend: see `dispatch.choose`.

    Returns:
        int32 [B, H, NQ, count], ascending.

    Raises:
        ValueError: the shapes do not fit or `count` is out of range.
        TypeError: the means are not float32.
    """
    if q_means.ndim != 4 or k_means.ndim != 4:
        raise ValueError(
            f"means must be [B, H, N, D], got {list(q_means.shape)} and {list(k_means.shape)}"
        )
    batch, heads, _, dim = q_means.shape
    blocks = k_means.shape[2]
    check_shape("k_means", k_means, (batch, heads, blocks, dim))
    if q_means.dtype != torch.float32 or k_means.dtype != torch.float32:
        raise TypeError(f"means must be float32, got {q_means.dtype} and {k_means.dtype}")
    if not 1 <= count <= blocks:
        raise ValueError(f"count must be 1 to {blocks}, the number of key blocks, got {count}")
    on_hopper = cuda if cuda and blocks > cuda.SHORT else None
    kernels = choose(
        "select_blocks", backend, q_means, reference, triton_kernels, on_hopper, mma,
        operands=(blocks,),
    )  # fmt: skip
    return kernels.select_blocks(q_means, k_means, count)


def block_map(
    q: torch.Tensor,
    k: torch.Tensor,
    topk: float,
    block_q: int = 128,
    block_k: int = 64,
    backend: str = "auto",
) -> torch.Tensor:
    """Steps 1 and 2 of SLA: the key blocks that each query block attends to.

    Scores are `mean(q) mean(k - mean_L(k))^T` over blocks. At least one block is selected, where
    the original selects none of a short sequence.

    Args:
        q, k: [B, L, H, D], float32, float16 or bfloat16.
        topk: share of the key blocks to select, above 0 and at most 1.
        block_q, block_k: rows in a query and a key block, 64 or 128.
        backend: see `dispatch.choose`.

    Returns:
        int32 [B, H, ceil(L / block_q), max(1, floor(topk ceil(L / block_k)))], ascending.

    Raises:
        ValueError, TypeError: a shape, block size, dtype or `topk` does not fit.
    """
    check_heads(q=q, k=k)
    check_topk(topk)
    k_means, _ = centered_means(k, block_k, backend)
    q_means = block_means(q, block_q, backend)
    return select_blocks(q_means, k_means, selected_count(topk, k_means.shape[2]), backend)


def selected_count(topk: float, blocks: int) -> int:
    """How many of `blocks` key blocks a share of `topk` selects, at least one."""
    return max(1, int(topk * blocks))


def check_topk(topk: float) -> None:
    """Require a share of the key blocks."""
    if not 0 < topk <= 1:
        raise ValueError(f"topk must be above 0 and at most 1, got {topk}")
