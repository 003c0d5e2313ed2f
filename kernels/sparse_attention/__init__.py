"""Softmax attention over the selected key blocks, in float and in low bits."""

from collections.abc import Sequence
from types import ModuleType

import torch

from ..block_map import centered_means
from ..checks import check_block_shape, check_heads, check_shape, float32_on_gpu, not_contiguous
from ..dispatch import (
    HOPPER,
    capability,
    choose,
    cuda_kernels,
    cuda_unavailable,
    has_fp8,
    has_triton,
)
from . import gradients_reference, reference
from .reference import Int8Blocks, Quantized, score_scale

if has_triton():
    from . import gradients_triton, hopper, mma
    from . import triton as triton_kernels
else:
    hopper = mma = gradients_triton = triton_kernels = None

PV_DTYPES = {"fp8": torch.float8_e4m3fn, "fp16": torch.float16}

__all__ = [
    "PV_DTYPES",
    "Int8Blocks",
    "attend_quantized",
    "default_pv",
    "mend_values",
    "reads_int8_keys",
    "room_for_values",
    "sage_attention",
    "sage_kernels",
    "sampled_bound",
    "sparse_attention",
    "sparse_attention_backward",
    "sparse_attention_jvp",
    "sparse_attention_with_lse",
]


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int = 128,
    block_k: int = 64,
    linear: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Exact softmax attention of each query block over its key blocks, plus `linear`.

    Steps 3 and 5 of SLA (arXiv 2512.16093, section 1.1).

    Args:
        q, k, v: [B, L, H, D], float32, float16 or bfloat16.
        block_map: int32 [B, H, ceil(L / block_q), count], indices of key blocks, each at most
            once and below ceil(L / block_k), which is not checked: `select_blocks` gives such.
        block_q, block_k: rows in a query and a key block: 128 and 64, 64 and 64, or 64 and 128.
        linear: the linear branch, contiguous [B, L, H, D] in q's dtype; the attention is added to
            it in place.
        backend: see `dispatch.choose`.

    Returns:
        [B, L, H, D] in q's dtype; `linear` if it was given.

    Raises:
        ValueError, TypeError: a shape, block size or dtype does not fit.
    """
    check_heads(q=q, k=k, v=v)
    _check_attention(q, block_map, block_q, block_k, linear)
    unsupported = not_contiguous(q, k, v), float32_on_gpu(q)
    kernels = choose(
        "sparse_attention", backend, q, reference, triton_kernels, unsupported=unsupported
    )
    out = _room(q) if linear is None else linear
    return kernels.sparse_attention(q, k, v, block_map, block_q, block_k, out, linear is not None)


def sparse_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int = 128,
    block_k: int = 64,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sparse_attention` out of place, and what its gradients need of the softmax.

    Args:
        q, k, v, block_map, block_q, block_k: see `sparse_attention`.
        backend: see `dispatch.choose`.

    Returns:
        out contiguous [B, L, H, D] in q's dtype, and lse float32 [B, H, L]: the logarithm to base
        2 of a query's sum of e^(q k / sqrt(D)) over its keys.

    Raises:
        ValueError, TypeError: a shape, block size or dtype does not fit.
    """
    check_heads(q=q, k=k, v=v)
    _check_attention(q, block_map, block_q, block_k, None)
    kernels = _gradient_kernels("sparse_attention_with_lse", backend, q, k, v)
    return kernels.sparse_attention_with_lse(q, k, v, block_map, block_q, block_k)


def sparse_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int = 128,
    block_k: int = 64,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `sparse_attention_with_lse` for q, k and v; the block map is a constant.

    Sums are float32 and taken in a fixed order: the same inputs give the same bits. Key blocks
    that no query block selected get zeros.

    Args:
        q, k, v, block_map, block_q, block_k: what the forward took.
        out, lse: what it returned.
        d_out: the gradient for out, [B, L, H, D] in q's dtype.
        backend: see `dispatch.choose`.

    Returns:
        dq, dk, dv, contiguous [B, L, H, D] in q's dtype.

    Raises:
        ValueError, TypeError: a shape, block size or dtype does not fit.
    """
    check_heads(q=q, k=k, v=v, out=out, d_out=d_out)
    _check_attention(q, block_map, block_q, block_k, None)
    _check_lse(lse, q)
    kernels = _gradient_kernels("sparse_attention_backward", backend, q, k, v)
    return kernels.sparse_attention_backward(
        q, k, v, out, lse, d_out, block_map, block_q, block_k
    )  # fmt: skip


def sparse_attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    tq: torch.Tensor,
    tk: torch.Tensor,
    tv: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int = 128,
    block_k: int = 64,
    backend: str = "auto",
) -> torch.Tensor:
    """The change of `sparse_attention_with_lse`'s out along tangents of q, k and v (forward mode).

    Args:
        q, k, v, block_map, block_q, block_k: what the forward took; the block map is a constant.
        out, lse: what it returned.
        tq, tk, tv: the tangents, [B, L, H, D] in q's dtype.
        backend: see `dispatch.choose`.

    Returns:
        Contiguous [B, L, H, D] in q's dtype.

    Raises:
        ValueError, TypeError: a shape, block size or dtype does not fit.
    """
    check_heads(q=q, k=k, v=v, out=out, tq=tq, tk=tk, tv=tv)
    _check_attention(q, block_map, block_q, block_k, None)
    _check_lse(lse, q)
    kernels = _gradient_kernels("sparse_attention_jvp", backend, q, k, v)
    return kernels.sparse_attention_jvp(
        q, k, v, out, lse, tq, tk, tv, block_map, block_q, block_k
    )  # fmt: skip


def sage_attention(
    q: torch.Tensor | Int8Blocks,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    pv: str | None = None,
    block_q: int = 128,
    block_k: int = 64,
    linear: torch.Tensor | None = None,
    k_mean: torch.Tensor | None = None,
    v_max: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`sparse_attention` in low bits: int8 q k^T, and fp8 or float16 weights and values.

    q and k - mean(k over L) get one scale per block; softmax does not see what is subtracted
    from every key. v gets one scale per channel (SageSLA, arXiv 2512.16093, section 1.1).

    Args:
        q: [B, L, H, D], or its int8 blocks of block_q rows where they are known already, as
            `qk_prepare` makes them.
        k, v, block_map, block_q, block_k, linear: see `sparse_attention`.
        pv: "fp8" (e4m3) or "fp16"; None takes `default_pv`. Sums are float32 either way, but for
            those within a key block on consumer cards, see mma.cu.
        k_mean: float32 [B, H, D], the mean of k over L if it is known already.
        v_max: float32 [B, H, D], max |v| over L if it is known already.
        backend: see `dispatch.choose`.

    Returns:
        [B, L, H, D] in v's dtype; `linear` if it was given.

    Raises:
        ValueError, TypeError: a shape, block size, dtype or `pv` does not fit.
    """
    rows = {"k": k, "v": v} if isinstance(q, Int8Blocks) else {"q": q, "k": k, "v": v}
    check_heads(**rows)
    _check_attention(v, block_map, block_q, block_k, linear)
    if isinstance(q, Int8Blocks):
        _check_int8_blocks(q, v, block_q)
    pv = pv or default_pv(v.device)
    _check_pv(pv)
    if k_mean is None:
        _, k_mean = centered_means(k, block_k, backend)
    per_channel = (v.shape[0], *v.shape[2:])
    check_shape("k_mean", k_mean, per_channel)
    if v_max is not None:
        check_shape("v_max", v_max, per_channel)
        v_max = v_max.float().contiguous()
    kernels = sage_kernels(*rows.values(), pv=pv, block_q=block_q, block_k=block_k, backend=backend)
    operands = kernels.quantize(q, k, v, k_mean, PV_DTYPES[pv], block_q, block_k, v_max)
    out = _room(v) if linear is None else linear
    return kernels.sage_attention(operands, block_map, out, linear is not None)


def sage_kernels(
    *rows: torch.Tensor, pv: str, block_q: int = 128, block_k: int = 64, backend: str = "auto"
) -> ModuleType:
    """The module that `sage_attention` of these `rows` [B, L, H, D] runs in.

    For who quantizes one operand at a time, to free it before the next is made: by its
    quantize_keys and quantize_values, the latter into parts of `room_for_values` where only some
    heads are there. They go into `attend_quantized`.
    """
    x = rows[-1]
    return choose(
        "sage_attention", backend, x, reference, triton_kernels, hopper, mma,
        unsupported=(not_contiguous(*rows), float32_on_gpu(x), _no_fp8(x, pv)),
        operands=(x.shape[-1], block_q, block_k, pv),
    )  # fmt: skip


def reads_int8_keys(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    pv: str | None = None,
    backend: str = "auto",
) -> bool:
    """Whether low-bit attention on `device` takes keys from `prepare_keys`: in CUDA C++, where they
    have 128 channels of 16 bits."""
    if backend == "reference" or dtype == torch.float32:
        return False
    kernels = cuda_kernels(device, hopper, mma)
    if kernels is None or head_dim != hopper.SHAPE[0]:
        return False
    pv = pv or default_pv(device)
    return kernels.unfit(*hopper.SHAPE, pv) is None and (pv != "fp8" or has_fp8(device))


def room_for_values(
    shape: Sequence[int], pv: str, device: torch.device, block_k: int = 64
) -> torch.Tensor:
    """What takes the values that belong to keys of `shape` [B, L, H, D]: [B, H, N, D, block_k].

    Raises:
        ValueError: `pv` is unknown.
    """
    _check_pv(pv)
    batch, length, heads, dim = shape
    shape = batch, heads, -(-length // block_k), dim, block_k
    return torch.empty(shape, dtype=PV_DTYPES[pv], device=device)


def sampled_bound(v: torch.Tensor) -> torch.Tensor:
    """A bound of |v|, [B, L, H, D], from a sample, float32 [B, H, D]; for `state_of_int8_keys` of
    linear_attention."""
    return triton_kernels.sampled_bound(v)


def mend_values(
    kernels: ModuleType,
    v: torch.Tensor,
    maximum: torch.Tensor,
    bound: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """The scales float32 [B, H, D] of what `state_of_int8_keys` made of v [B, L, H, D] by the
    `bound` for `kernels`, see `sage_kernels`; channels whose `maximum` is beyond it are quantized
    again in `values`."""
    return kernels.mend_values(v, maximum, bound, values)


def attend_quantized(
    kernels: ModuleType,
    q: Int8Blocks,
    k: Int8Blocks,
    v: tuple[torch.Tensor, torch.Tensor],
    block_map: torch.Tensor,
    out: torch.Tensor,
    add: bool,
) -> torch.Tensor:
    """`sage_attention` of what `kernels`, see `sage_kernels`, quantized: written to `out`
    [B, L, H, D], or added to what it holds."""
    block_q = q.integers.shape[2] // q.scale.shape[2]
    _check_attention(out, block_map, block_q, v[0].shape[-1], None)
    operands = Quantized(q.integers, q.scale * score_scale(out), *k, *v)
    return kernels.sage_attention(operands, block_map, out, add)


def default_pv(device: torch.device) -> str:
    """What `sage_attention` takes for weights and values on `device`: "fp8" or "fp16".

    fp8 where the tensor cores have it: faster, at 1.6 times the error of fp16. But for a Hopper
    that cannot run the CUDA kernel: exact sums of fp8 are slow there in Triton.
    """
    slow = capability(device) == HOPPER and cuda_unavailable(device)
    return "fp8" if has_fp8(device) and not slow else "fp16"


def _room(like: torch.Tensor) -> torch.Tensor:
    """A new contiguous tensor of the same shape."""
    return torch.empty(*like.shape, dtype=like.dtype, device=like.device)


def _gradient_kernels(
    op: str, backend: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> ModuleType:
    """The module that runs `op`; of gradients and tangents it copies what it cannot read."""
    unsupported = not_contiguous(q, k, v), float32_on_gpu(q)
    return choose(op, backend, q, gradients_reference, gradients_triton, unsupported=unsupported)


def _check_lse(lse: torch.Tensor, q: torch.Tensor) -> None:
    """Require the logarithms that belong to q [B, L, H, D]."""
    batch, length, heads, _ = q.shape
    check_shape("lse", lse, (batch, heads, length))
    if lse.dtype != torch.promote_types(q.dtype, torch.float32):
        raise TypeError(f"lse must be float32, got {lse.dtype}")


def _check_attention(
    x: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int,
    block_k: int,
    linear: torch.Tensor | None,
) -> None:
    """What both ops ask of the rest, given one of q, k, v."""
    check_block_shape(block_q, block_k)
    batch, length, heads, _ = x.shape
    if block_map.dtype != torch.int32:
        raise TypeError(f"block_map must be int32, got {block_map.dtype}")
    count = block_map.shape[-1]
    check_shape("block_map", block_map, (batch, heads, -(-length // block_q), count))
    blocks = -(-length // block_k)
    if not 1 <= count <= blocks:
        raise ValueError(f"block_map must select 1 to {blocks} key blocks, got {count}")
    if linear is not None:
        check_shape("linear", linear, tuple(x.shape))
        if linear.dtype != x.dtype or not linear.is_contiguous():
            raise ValueError(
                f"linear must be contiguous and {x.dtype}, "
                f"got {linear.dtype} with strides {list(linear.stride())}"
            )


def _check_pv(pv: str) -> None:
    """Require a name of PV_DTYPES."""
    if pv not in PV_DTYPES:
        raise ValueError(f"pv must be 'fp8', 'fp16' or None, got {pv!r}")


def _check_int8_blocks(q: Int8Blocks, v: torch.Tensor, block_q: int) -> None:
    """Require that q in int8 and its scales fit v."""
    batch, length, heads, dim = v.shape
    blocks = -(-length // block_q)
    check_shape("q.integers", q.integers, (batch, heads, blocks * block_q, dim))
    check_shape("q.scale", q.scale, (batch, heads, blocks))
    if q.integers.dtype != torch.int8 or q.scale.dtype != torch.float32:
        raise TypeError(f"q must be int8 and float32, got {q.integers.dtype}, {q.scale.dtype}")
    if not q.integers.is_contiguous() or not q.scale.is_contiguous():
        raise ValueError("q.integers and q.scale must be contiguous")


def _no_fp8(v: torch.Tensor, pv: str) -> str | None:
    """Why Triton cannot multiply fp8 here; None where it can or need not."""
    if pv != "fp8" or not v.is_cuda or has_fp8(v.device):
        return None
    major, minor = capability(v.device)
    return f"the GPU is sm_{major}{minor}, fp8 needs sm_89 or newer (pv='fp16' runs here)"
