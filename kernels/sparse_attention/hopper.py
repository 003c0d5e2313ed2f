"""Low-bit sparse attention on Hopper, in CUDA C++: see hopper.cu."""

import functools
from pathlib import Path

import torch

from .. import nvrtc
from ..dispatch import multiprocessors
from . import triton as triton_kernels
from .reference import Int8Blocks, Quantized

SOURCE = Path(__file__).with_suffix(".cu")
TARGET = "sm_90a"
THREADS = 384
# Alignment and hopper.cu's Shared: stages, queries of two tiles, sums.
SHARED_BYTES = 1024 + 7 * (2 * 64 * 128 + 24) + 128 * 128 * (2 + 4) + 2 * 20
SHAPE = 128, 128, 64  # head dim, rows in a query and a key block
Operands = nvrtc.operands(
    pointers="q q_scale k k_scale v v_scale block_map out",
    integers="length count q_blocks k_blocks heads tiles add",
)


def unfit(head_dim: int, block_q: int, block_k: int, pv: str) -> str | None:
    """Why the kernel cannot attend in these sizes; None where it can."""
    if (head_dim, block_q, block_k) != SHAPE:
        found = f"{head_dim}, {block_q} and {block_k}"
        return f"head dim and rows of query and key blocks are {found}, not 128, 128 and 64"
    return None if pv == "fp8" else f"the values are {pv}"


def quantize(
    q: torch.Tensor | Int8Blocks,
    k: torch.Tensor,
    v: torch.Tensor,
    k_mean: torch.Tensor,
    v_dtype: torch.dtype,
    block_q: int,
    block_k: int,
    v_max: torch.Tensor | None = None,
) -> Quantized:
    """`quantize` of the Triton file, with k's and v's blocks as the tensor cores read them.

    Rows of k are 128 bytes of channels, those of v 64 bytes of keys. Within eight rows of k (four
    pairs of v) their chunks of 16 bytes trade places, so that shared memory gives a column of
    chunks at once. v's keys stand in the order in which a thread holds their weights, its channels
    in one that gives a thread eight side by side of 32.
    """
    arguments = q, k, v, k_mean, v_dtype, block_q, block_k, v_max
    return triton_kernels.quantize(*arguments, swizzled=True, eights=True)


# The same, one operand at a time.
quantize_keys = functools.partial(triton_kernels.quantize_keys, swizzled=True)
quantize_values = functools.partial(triton_kernels.quantize_values, swizzled=True, eights=True)
# Behind `state_of_int8_keys` of linear_attention, which quantizes the values that it sums up.
mend_values = functools.partial(triton_kernels.mend_values, eights=True)


def sage_attention(
    operands: Quantized, block_map: torch.Tensor, out: torch.Tensor, add: bool
) -> torch.Tensor:
    """`sage_attention` of the Triton file, on operands of `quantize` above."""
    if out.data_ptr() % 16:
        return out.copy_(sage_attention(operands, block_map, out.clone(), add))
    batch, length, heads, _ = out.shape
    q_blocks, count = block_map.shape[2:]
    tiles = batch * heads * q_blocks
    block_map = block_map.contiguous()
    arguments = Operands(
        *map(nvrtc.address, (*operands, block_map, out)),
        length, count, q_blocks, operands.k_scale.shape[2], heads, tiles, add,
    )  # fmt: skip
    kernel = nvrtc.load(
        SOURCE, "sage_attention", TARGET, SHARED_BYTES, Operands, out.get_device(),
        BF16=int(out.dtype == torch.bfloat16),
    )  # fmt: skip
    # A program that goes on to another tile takes two blocks of each at least.
    programs = min(tiles, multiprocessors(out.device)) if count > 1 else tiles
    kernel.launch(programs, THREADS, arguments)
    return out
