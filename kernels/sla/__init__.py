"""Sparse-linear attention, whole: a composition of the ops around it."""

import torch

from ..block_map import (
    block_means,
    center_means,
    centered_means,
    check_topk,
    select_blocks,
    selected_count,
)
from ..block_map.checks import check_block_shape, check_heads, check_shape
from ..linear_attention import (
    LinearBranch,
    check_feature_map,
    key_value_state,
    key_value_state_and_maximum,
    linear_attention,
)
from ..qk_prepare import prepare
from ..sparse_attention import sage_attention, sparse_attention

__all__ = ["sla", "sla_from_projections"]


def sla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj_weight: torch.Tensor | None,
    proj_bias: torch.Tensor | None,
    topk: float = 0.1,
    low_bit: bool = False,
    feature_map: str = "softmax",
    block_map: torch.Tensor | None = None,
    pv: str | None = None,
    block_q: int = 128,
    block_k: int = 64,
    backend: str = "auto",
) -> torch.Tensor:
    """Sparse-linear attention (arXiv 2512.16093, section 1.1): softmax over the key blocks that
    matter, plus a projected linear attention over all keys.

    Args:
        q, k, v: [B, L, H, D], float32, float16 or bfloat16, after RMSNorm and RoPE.
        proj_weight: `proj_l` [D, D] (out, in), any float dtype; None leaves the branch out.
        proj_bias: bias of `proj_l` [D], any float dtype; None where there is no branch.
        topk: share of the key blocks to attend to, above 0 and at most 1.
        low_bit: SageSLA: int8 q k^T and fp8 or float16 values.
        feature_map: phi of the linear branch: "softmax", "elu" or "relu".
        block_map: int32 [B, H, ceil(L / block_q), count], in place of choosing by topk; see
            `sparse_attention`.
        pv: "fp8" or "fp16" values in low bits; None takes `default_pv` of the GPU.
        block_q, block_k: rows in a query and a key block: 128 and 64, 64 and 64, or 64 and 128.
        backend: see `dispatch.use_triton`.

    Returns:
        [B, L, H, D] in q's dtype.

    Raises:
        ValueError, TypeError: a shape, block size, dtype or option does not fit.
    """
    _check(q, k, v, block_q, block_k, topk)
    _check_projection(q, proj_weight, proj_bias, feature_map)
    k_mean = None
    if block_map is None:
        k_means, k_mean = centered_means(k, block_k, backend)
        q_means = block_means(q, block_q, backend=backend)
        count = selected_count(topk, k_means.shape[2])
        block_map = select_blocks(q_means, k_means, count, backend)
    linear, v_max = _linear_branch(k, v, proj_weight, proj_bias, feature_map, low_bit, backend)
    onto = None if linear is None else linear_attention(q, *linear, backend=backend)
    shared = {"block_q": block_q, "block_k": block_k, "onto": onto, "backend": backend}
    if low_bit:
        return sage_attention(q, k, v, block_map, pv, k_mean=k_mean, v_max=v_max, **shared)
    return sparse_attention(q, k, v, block_map, **shared)


def sla_from_projections(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    proj_weight: torch.Tensor | None,
    proj_bias: torch.Tensor | None,
    eps: float = 1e-6,
    topk: float = 0.1,
    low_bit: bool = False,
    feature_map: str = "softmax",
    block_map: torch.Tensor | None = None,
    pv: str | None = None,
    block_q: int = 128,
    block_k: int = 64,
    backend: str = "auto",
    overwrite: bool = False,
) -> torch.Tensor:
    """`sla` of what Wan's projections give: `sla(apply_rope(rms_norm(q)), ..., v)`.

    Block means and the int8 of q come out of the same pass as the norm and the rotation.

    Args:
        q, k, v: [B, L, H, D], the projections; float32, float16 or bfloat16.
        q_weight, k_weight: [H * D] of any float dtype, of the RMSNorm over all heads.
        cos, sin: [1 or B, L, D / 2] float32; see `apply_rope`. Pairs that lie side by side
            (stride 1) save a copy.
        eps: of both norms.
        proj_weight, proj_bias, topk, low_bit, feature_map, block_map, pv, block_q, block_k,
            backend: see `sla`.
        overwrite: q and k, contiguous, are overwritten, which saves the memory of two activations;
            in low bits with a linear branch the result is q's memory.

    Returns:
        [B, L, H, D] in q's dtype.

    Raises:
        ValueError, TypeError: a shape, block size, dtype or option does not fit.
    """
    _check(q, k, v, block_q, block_k, topk)
    _check_projection(q, proj_weight, proj_bias, feature_map)
    # The kernels need pairs side by side; copied here, so that q and k share the copy.
    cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (cos, sin))
    q_out, k_out = (q, k) if overwrite else (None, None)
    keys = prepare(k, k_weight, cos, sin, eps, block_k, False, backend, k_out)
    k_means, k_mean = center_means(keys.means, k.shape[1], block_k, backend)
    linear, v_max = _linear_branch(keys.x, v, proj_weight, proj_bias, feature_map, low_bit, backend)
    # In 16 bits attention reads the rotated q, which then cannot make room for its linear branch.
    passing = linear if low_bit else None
    queries = prepare(q, q_weight, cos, sin, eps, block_q, low_bit, backend, q_out, passing)
    if block_map is None:
        count = selected_count(topk, k_means.shape[2])
        block_map = select_blocks(queries.means, k_means, count, backend)
    shared = {"block_q": block_q, "block_k": block_k, "backend": backend}
    if not low_bit:
        onto = None if linear is None else linear_attention(queries.x, *linear, backend=backend)
        return sparse_attention(queries.x, keys.x, v, block_map, onto=onto, **shared)
    known = {"k_mean": k_mean, "q_blocks": (queries.q, queries.scale), "v_max": v_max}
    onto = None if linear is None else queries.x
    return sage_attention(queries.x, keys.x, v, block_map, pv, onto=onto, **known, **shared)


def _linear_branch(k, v, proj_weight, proj_bias, feature_map, low_bit, backend):
    """The linear branch, None without a projection, and in low bits the maximum of |v|."""
    if proj_weight is None:
        return None, None
    if low_bit:
        *sums, v_max = key_value_state_and_maximum(k, v, feature_map, backend)
    else:
        sums, v_max = key_value_state(k, v, feature_map, backend), None
    return LinearBranch(*sums, proj_weight, proj_bias, feature_map), v_max


def _check(q, k, v, block_q, block_k, topk) -> None:
    """What both ops ask of their inputs."""
    check_heads(q=q, k=k, v=v)
    check_block_shape(block_q, block_k)
    check_topk(topk)


def _check_projection(q, proj_weight, proj_bias, feature_map) -> None:
    """Require proj_l to be whole and to fit the head dim."""
    if (proj_weight is None) != (proj_bias is None):
        missing = "proj_weight" if proj_weight is None else "proj_bias"
        raise ValueError(f"{missing} is None, give both or neither")
    if proj_weight is not None:
        check_feature_map(feature_map)
        check_shape("proj_weight", proj_weight, (q.shape[-1], q.shape[-1]))
        check_shape("proj_bias", proj_bias, (q.shape[-1],))
