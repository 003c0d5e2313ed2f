"""Low-bit sparse attention by mma.sync, for GeForce cards and A100, in CUDA C++: see mma.cu."""

import functools
from pathlib import Path

import torch

from .. import nvrtc
from ..dispatch import capability
from . import hopper
from . import triton as triton_kernels
from .hopper import Operands
from .reference import Int8Blocks, Quantized

SOURCE = Path(__file__).with_suffix(".cu")
THREADS = 128
HEAD_DIMS = 64, 128
SHAPE = 128, 64  # rows in a query and a key block
VALUE_LIMIT = 7.0  # 448 / 64: numbers round as if they went up to 448, but their sums fit float16
FP8_NVRTC = 12, 8  # the oldest that multiplies fp8 with sums in float16
# The cards of data centers multiply as fast with float32 sums; GeForce cards at half the rate.
LONG_SUMS = (8, 0), (9, 0)


def unfit(head_dim: int, block_q: int, block_k: int, pv: str) -> str | None:
    """Why the kernel cannot attend in these sizes; None where it can."""
    if head_dim not in HEAD_DIMS or (block_q, block_k) != SHAPE:
        found = f"{head_dim}, {block_q} and {block_k}"
        return f"head dim and rows of query and key blocks are {found}, not 128, 128 and 64"
    if pv == "fp8" and nvrtc.version() < FP8_NVRTC:
        major, minor = nvrtc.version()
        return f"torch's NVRTC is {major}.{minor}, and fp8 needs 12.8"
    return None


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
    """`quantize` of hopper.py, for all head dims and values that fit; values go to VALUE_LIMIT, and
    their channels stand in their own order."""
    arguments = q, k, v, k_mean, v_dtype, block_q, block_k, v_max
    return triton_kernels.quantize(*arguments, swizzled=True, limit=VALUE_LIMIT)


# The same, one operand at a time.
quantize_keys = hopper.quantize_keys
quantize_values = functools.partial(
    triton_kernels.quantize_values, swizzled=True, limit=VALUE_LIMIT
)
mend_values = functools.partial(triton_kernels.mend_values, limit=VALUE_LIMIT)


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
    kernel = _kernel(out, "fp8" if operands.v.dtype == torch.float8_e4m3fn else "fp16")
    kernel.launch(tiles, THREADS, arguments)
    return out


def constants(card: tuple[int, int], head_dim: int, pv: str, dtype: torch.dtype) -> dict[str, int]:
    """What mma.cu is compiled with for values in `pv` and an output in `dtype`."""
    return {
        "HEAD_DIM": head_dim, "FP8": int(pv == "fp8"), "SHORT_SUMS": int(card not in LONG_SUMS),
        "VALUE_LIMIT": int(VALUE_LIMIT), "BF16": int(dtype == torch.bfloat16),
    }  # fmt: skip


def shared_bytes(head_dim: int, pv: str) -> int:
    """mma.cu's Shared, of which two fit a multiprocessor of 100 KB: queries, keys of two blocks and
    values of one, scales and numbers."""
    block_q, block_k = SHAPE
    return head_dim * (block_q + block_k * (3 if pv == "fp8" else 4)) + 16


def _kernel(out: torch.Tensor, pv: str) -> nvrtc.Kernel:
    card, head_dim = capability(out.device), out.shape[-1]
    return nvrtc.load(
        SOURCE, "sage_attention", nvrtc.target_of(card, out.device), shared_bytes(head_dim, pv),
        Operands, out.device.index, **constants(card, head_dim, pv, out.dtype),
    )  # fmt: skip
