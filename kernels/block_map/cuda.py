"""Block selection in CUDA C++, on Hopper and on cards of mma.sync: see cuda.cu."""

from pathlib import Path

import torch

from .. import nvrtc
from ..dispatch import capability
from . import triton as triton_kernels

SOURCE = Path(__file__).with_suffix(".cu")
WARPS = 4  # of a program, a row of scores each
# Scores of a row: Triton takes short ones in two warps, which CUDA C++ does not do in less time.
SHORT = 512
MOST = 2048  # that a warp's registers hold
Operands = nvrtc.operands(pointers="scores block_map", integers="rows n_keys count")


def unfit(blocks: int) -> str | None:
    """Why the kernel cannot select of so many key blocks; None where it can."""
    return None if blocks <= MOST else f"of {blocks} key blocks, over {MOST}, it cannot select"


def select_blocks(q_means: torch.Tensor, k_means: torch.Tensor, count: int) -> torch.Tensor:
    """`select_blocks` of the Triton file, of what is not `unfit`."""
    return triton_kernels.select_blocks(q_means, k_means, count, select_rows)


def select_rows(scores: torch.Tensor, block_map: torch.Tensor) -> None:
    """`select_rows` of the Triton file."""
    heads, queries, count = block_map.shape
    rows = heads * queries
    arguments = nvrtc.address(scores), nvrtc.address(block_map), rows, scores.shape[2], count
    target = nvrtc.target_of(capability(scores.device), scores.device)
    kernel = nvrtc.load(SOURCE, "select_blocks", target, 0, Operands, scores.device.index)
    kernel.launch(-(-rows // WARPS), 32 * WARPS, Operands(*arguments))
