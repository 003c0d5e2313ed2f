"""Softmax attention over the selected key blocks, in float and in low bits."""

import torch

from ..block_map import centered_means
from ..block_map.checks import (
    check_block_shape,
    check_heads,
    check_shape,
    float32_on_gpu,
    not_contiguous,
)
from ..dispatch import HOPPER, capability, has_fp8, has_triton, use_triton
from ..nvrtc import cuda_unavailable, use_cuda
from . import reference

if has_triton():
    from . import hopper
    from . import triton as triton_kernels

PV_DTYPES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}

__all__ = ["PV_DTYPES", "default_pv", "sage_attention", "sparse_attention"]


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    onto: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Exact softmax attention of each query block over its key blocks.

    Step 3 of SLA (arXiv 2512.16093, section 1.1), and step 5 where `onto` is the linear branch.

    Args:
        q, k, v: [B, L, H, D], float32, float16 or bfloat16.
        block_map: int32 [B, H, ceil(L / block_q), count], indices of key blocks, each at most
            once and below ceil(L / block_k), which is not checked: `select_blocks` gives such.
        block_q, block_k: rows in a query and a key block: 128 and 64, 64 and 64, or 64 and 128.
        scale: factor of q k^T, above 0; 1 / sqrt(D) if None.
        onto: contiguous [B, L, H, D] in q's dtype, to which the attention is added in place.
        backend: see `dispatch.use_triton`.

    Returns:
        [B, L, H, D] in q's dtype; `onto` if it was given.

    Raises:
        ValueError, TypeError: a shape, block size, dtype or the scale does not fit.
    """
    scale = _check(q, k, v, block_map, block_q, block_k, scale, onto)
    arguments = q, k, v, block_map, block_q, block_k, scale, onto
    reasons = not_contiguous(q, k, v), float32_on_gpu(q)
    if use_triton("sparse_attention", backend, q, *reasons):
        return triton_kernels.sparse_attention(*arguments)
    return reference.sparse_attention(*arguments)


def sage_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    pv: str | None = None,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    onto: torch.Tensor | None = None,
    k_mean: torch.Tensor | None = None,
    q_blocks: tuple[torch.Tensor, torch.Tensor] | None = None,
    v_max: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`sparse_attention` in low bits: int8 q k^T, and fp8 or float16 weights and values.

    q and k - mean(k over L) get one scale per block; softmax does not see what is subtracted
    from every key. v gets one scale per channel (SageSLA, arXiv 2512.16093, section 1.1).

    Args:
        q, k, v, block_map, block_q, block_k, scale, onto: see `sparse_attention`.
        pv: "fp8" (e4m3) or "fp16"; None takes `default_pv`. Sums are float32 either way.
        k_mean: float32 [B, H, D], the mean of k over L if it is known already.
        q_blocks: q in int8 [B, H, ceil(L / block_q) block_q, D] and its scales, float32
            [B, H, ceil(L / block_q)], if they are known already; see `qk_prepare`.
        v_max: float32 [B, H, D], max |v| over L if it is known already.
        backend: see `dispatch.use_triton`.

    Returns:
        [B, L, H, D] in q's dtype.

    Raises:
        ValueError, TypeError: a shape, block size, dtype, the scale or `pv` does not fit.
    """
    scale = _check(q, k, v, block_map, block_q, block_k, scale, onto)
    pv = pv or default_pv(q.device)
    if pv not in PV_DTYPES:
        raise ValueError(f"pv must be 'fp8', 'fp16' or None, got {pv!r}")
    if k_mean is None:
        _, k_mean = centered_means(k, block_k, backend)
    per_channel = (q.shape[0], *q.shape[2:])
    check_shape("k_mean", k_mean, per_channel)
    if v_max is not None:
        check_shape("v_max", v_max, per_channel)
        v_max = v_max.float().contiguous()
    if q_blocks is not None:
        _check_q_blocks(q, q_blocks, block_q)
    sizes = block_q, block_k
    reasons = not_contiguous(q, k, v), float32_on_gpu(q), _no_fp8(q, pv)
    kernels = reference
    if use_triton("sage_attention", backend, q, *reasons):
        shape = q.shape[-1], *sizes
        on_hopper = use_cuda("sage_attention", q.device, hopper.unfit, *shape, pv)
        kernels = hopper if on_hopper else triton_kernels
    operands = kernels.quantize(q, k, v, k_mean, PV_DTYPES[pv], *sizes, scale, q_blocks, v_max)
    return kernels.sage_attention(q, operands, block_map, *sizes, onto)


def default_pv(device: torch.device) -> str:
    """What `sage_attention` takes for weights and values on `device`: "fp8" or "fp16".

    fp8 where the tensor cores have it: faster, at 1.6 times the error of fp16. But for a Hopper
    that cannot run the CUDA kernel: exact sums of fp8 are slow there in Triton.
    """
    slow = capability(device) == HOPPER and cuda_unavailable(device)
    return "fp8" if has_fp8(device) and not slow else "fp16"


def _check(q, k, v, block_map, block_q, block_k, scale, onto) -> float:
    """Check the arguments that both ops share; returns the scale."""
    check_heads(q=q, k=k, v=v)
    check_block_shape(block_q, block_k)
    batch, length, heads, dim = q.shape
    if block_map.dtype != torch.int32:
        raise TypeError(f"block_map must be int32, got {block_map.dtype}")
    count = block_map.shape[-1]
    check_shape("block_map", block_map, (batch, heads, -(-length // block_q), count))
    blocks = -(-length // block_k)
    if not 1 <= count <= blocks:
        raise ValueError(f"block_map must select 1 to {blocks} key blocks, got {count}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    if onto is not None:
        check_shape("onto", onto, tuple(q.shape))
        if onto.dtype != q.dtype or not onto.is_contiguous():
            raise ValueError(
                f"onto must be contiguous and {q.dtype}, "
                f"got {onto.dtype} with strides {list(onto.stride())}"
            )
    return dim**-0.5 if scale is None else scale


def _check_q_blocks(q, q_blocks, block_q) -> None:
    """Require that q in int8 and its scales fit q."""
    integers, scale = q_blocks
    batch, length, heads, dim = q.shape
    blocks = -(-length // block_q)
    check_shape("q_blocks[0]", integers, (batch, heads, blocks * block_q, dim))
    check_shape("q_blocks[1]", scale, (batch, heads, blocks))
    if integers.dtype != torch.int8 or scale.dtype != torch.float32:
        raise TypeError(f"q_blocks must be int8 and float32, got {integers.dtype}, {scale.dtype}")
    if not integers.is_contiguous() or not scale.is_contiguous():
        raise ValueError("q_blocks must be contiguous")


def _no_fp8(q: torch.Tensor, pv: str) -> str | None:
    """Why Triton cannot multiply fp8 here; None where it can or need not."""
    if pv != "fp8" or q.device.type != "cuda" or has_fp8(q.device):
        return None
    major, minor = capability(q.device)
    return f"the GPU is sm_{major}{minor}, fp8 needs sm_89 or newer (pv='fp16' runs here)"
