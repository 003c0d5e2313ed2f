"""Block selection on cards of mma.sync: scores in CUDA C++, see scores.cu, and of long rows the
selection as well, see cuda.py."""

from pathlib import Path

import torch

from .. import nvrtc
from ..dispatch import capability
from . import triton as triton_kernels
from .cuda import SHORT, select_rows, unfit  # noqa: F401 - asked of this module, too

SOURCE = Path(__file__).with_name("scores.cu")
QUERIES, KEYS = 64, 128  # of a program, one head
THREADS = 128
SHARED_BYTES = 2 * (QUERIES + KEYS) * 32 * 4  # two steps of 32 channels, float32
Operands = nvrtc.operands(pointers="q k scores", integers="n_queries n_keys")


def select_blocks(q_means: torch.Tensor, k_means: torch.Tensor, count: int) -> torch.Tensor:
    """`select_blocks` of the Triton file, of what is not `unfit`."""
    select = select_rows if k_means.shape[2] > SHORT else triton_kernels.select_rows
    return triton_kernels.select_blocks(q_means, k_means, count, select, score_blocks)


def score_blocks(q: torch.Tensor, k: torch.Tensor, scores: torch.Tensor) -> None:
    """`score_blocks` of the Triton file."""
    heads, queries, dim = q.shape
    keys = k.shape[1]
    operands = Operands(*map(nvrtc.address, (q, k, scores)), queries, keys)
    target = nvrtc.target_of(capability(q.device), q.device)
    kernel = nvrtc.load(
        SOURCE, "score_blocks", target, SHARED_BYTES, Operands, q.device.index, HEAD_DIM=dim
    )
    kernel.launch(heads * -(-queries // QUERIES) * -(-keys // KEYS), THREADS, operands)
