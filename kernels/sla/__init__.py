"""Sparse-linear attention, whole: a composition of the ops around it."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from ..block_map import block_means, center_means, check_topk, select_blocks, selected_count
from ..checks import check_block_shape, check_heads, check_shape, in_steps_of_16_bytes
from ..derivatives import asked_for
from ..linear_attention import (
    LinearBranch,
    check_feature_map,
    key_value_state,
    key_value_state_and_maximum,
    linear_attention,
    state_of_int8_keys,
)
from ..qk_prepare import Int8Keys, Prepared, prepare, prepare_keys
from ..sparse_attention import (
    PV_DTYPES,
    Int8Blocks,
    attend_quantized,
    default_pv,
    mend_values,
    reads_int8_keys,
    room_for_values,
    sage_attention,
    sage_kernels,
    sampled_bound,
    sparse_attention,
)
from .autograd import Options, SparseLinearAttention

__all__ = ["Norms", "sla", "sla_from_projections"]

Pair = tuple[torch.Tensor, torch.Tensor]
# q or k, or what gives it and its `row_norms`, see `prepare`, or None for these.
Projection = torch.Tensor | Callable[[], tuple[torch.Tensor, torch.Tensor | None]]

BLOCK_Q, BLOCK_K = 128, 64  # rows in a query and a key block, as the models were trained


class Norms(NamedTuple):
    """RMSNorm of q and k over all heads of an attention, of which some may be at hand."""

    q: torch.Tensor  # weight [H * D] of those that are, of any float dtype
    k: torch.Tensor
    eps: float = 1e-6
    heads: int | None = None  # of the attention; None where all are at hand


def sla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj: Pair | None,
    topk: float = 0.1,
    low_bit: bool = False,
    feature_map: str = "softmax",
    block_map: torch.Tensor | None = None,
    pv: str | None = None,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    backend: str = "auto",
) -> torch.Tensor:
    """Sparse-linear attention (arXiv 2512.16093, section 1.1): softmax over the key blocks that
    matter, plus a projected linear attention over all keys.

    Differentiable once in q, k, v and proj, by autograd and by torch.func.jvp; the key blocks that
    were selected are constants. The same key blocks are selected again from the same q and k.

    Args:
        q, k, v: [B, L, H, D], float32, float16 or bfloat16, after RMSNorm and RoPE.
        proj: weight [D, D] (out, in) and bias [D] of `proj_l`, any float dtypes; None leaves the
            linear branch out.
        topk: share of the key blocks to attend to, above 0 and at most 1.
        low_bit: SageSLA: int8 q k^T and fp8 or float16 values; has no gradients.
        feature_map: phi of the linear branch: "softmax", "elu" or "relu".
        block_map: int32 [B, H, ceil(L / block_q), count], in place of choosing by topk; see
            `sparse_attention`.
        pv: "fp8" or "fp16" values in low bits; None takes `default_pv` of the GPU.
        block_q, block_k: rows in a query and a key block: 128 and 64, 64 and 64, or 64 and 128.
        backend: see `dispatch.choose`.

    Returns:
        [B, L, H, D] in q's dtype.

    Raises:
        ValueError, TypeError: a shape, block size, dtype or option does not fit, or gradients are
            asked for in low bits.
    """
    _check_inputs(q, k, v, proj, topk, block_q, block_k)
    check_feature_map(feature_map)
    # Training may run in autocast, which would round the float32 sums.
    with torch.autocast(q.device.type, enabled=False):
        if asked_for(q, k, v, *(proj or ())):
            options = Options(topk, feature_map, block_q, block_k, backend)
            return _differentiable(q, k, v, proj, low_bit, block_map, options)
        as_trained = (feature_map, block_q, block_k) == ("softmax", BLOCK_Q, BLOCK_K)
        if low_bit and as_trained and q.dtype == torch.bfloat16:
            pv = pv or default_pv(q.device)
            if reads_int8_keys(q.device, q.dtype, q.shape[3], pv, backend):
                return _by_passes_of_projections(q, k, v, proj, topk, block_map, pv, backend)
        k_means = block_means(k, block_k, backend)
        keys = _keys(k, v, k_means, proj, feature_map, low_bit, block_k, backend)
        queries = Prepared(q, None, block_means(q, block_q, backend), None)
        return _attend(queries, keys, topk, low_bit, block_map, pv, block_q, block_k, backend)


def _differentiable(q, k, v, proj, low_bit, block_map, options: Options) -> torch.Tensor:
    """`sla` with what its gradients need kept."""
    if low_bit:
        raise ValueError(
            "low bits have no gradients, and gradients are asked for. Pass low_bit=False: what is "
            "trained in 16 bits runs in low bits"
        )
    return SparseLinearAttention.apply(q, k, v, *(proj or (None, None)), block_map, options)[0]


def _by_passes_of_projections(q, k, v, proj, topk, block_map, pv, backend) -> torch.Tensor:
    """`sla` in low bits by the passes that norm and rotate, here by 1 and not at all: q is read
    once for its means, int8 and linear branch, k once for its means and int8."""
    batch, length, heads, dim = q.shape
    options = {"dtype": torch.float32, "device": q.device}
    row_norms, weight = (torch.ones(n, **options) for n in ((batch, length), heads * dim))
    cos = torch.ones(1, length, dim // 2, **options)
    given = (lambda: (q, row_norms)), (lambda: (k, row_norms))
    rotation, low_bit, in_place = (cos, torch.zeros_like(cos)), True, False
    return _from_projections(
        *given, v, Norms(weight, weight), rotation, proj, topk, low_bit, block_map, pv, backend,
        in_place,
    )  # fmt: skip


def sla_from_projections(
    q: Projection,
    k: Projection,
    v: torch.Tensor | Callable[[], torch.Tensor | Iterator[torch.Tensor]],
    norms: Norms | Pair,
    rotation: Pair,
    proj: Pair | None,
    topk: float = 0.1,
    low_bit: bool = False,
    block_map: torch.Tensor | None = None,
    pv: str | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`sla` of what Wan's projections give, `sla(apply_rope(rms_norm(q)), ..., v)`, for inference.

    Block means and the int8 of q, in CUDA C++ that of k too, come out of the same pass as the norm
    and the rotation. q and k may be overwritten, which saves the memory of two activations; in low
    bits the result is q's memory.

    Args:
        q, k: [B, L, H, D], the projections, contiguous; float32, float16 or bfloat16.
        v: [B, L, H, D] of the same dtype. All three may be functions that give them, called for k,
            v and q in turn: in low bits k and v are then freed before there is a q, and k before
            there is a v where its int8 is all that is left of it, see `prepare_keys`. Those of q
            and k give two things, the second one its `row_norms`, see `prepare`, or None. That of v
            may in low bits give an iterator: of one sample, some heads after the others, each of
            which is quantized before the next is asked for.
        norms: see `Norms`; what comes of some heads is what it is among all, bit for bit.
        rotation: cos and sin [1 or B, L, D / 2] float32; see `apply_rope`. Pairs that lie side by
            side (stride 1) save a copy.
        proj, topk, low_bit, block_map, pv, backend: see `sla`. Blocks have 128 and 64 rows, the
            feature map is "softmax".

    Returns:
        [B, L, H, D] in q's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or option does not fit.
    """
    in_place = True
    return _from_projections(
        q, k, v, norms, rotation, proj, topk, low_bit, block_map, pv, backend, in_place
    )


def _from_projections(
    q, k, v, norms, rotation, proj, topk, low_bit, block_map, pv, backend, in_place: bool
) -> torch.Tensor:
    """`sla_from_projections`, that leaves q and k as they are unless `in_place`."""
    # The kernels need pairs side by side; copied here, so that q and k share the copy.
    rotation = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in rotation)
    q_norm, k_norm, eps, heads = norms if isinstance(norms, Norms) else Norms(*norms)
    k, row_norms = k() if callable(k) else (k, None)
    _check_inputs(k, k, k, proj, topk, BLOCK_Q, BLOCK_K)
    shape, of_k = k.shape, (k_norm, *rotation, eps)
    if low_bit:
        pv = pv or default_pv(k.device)
        if reads_int8_keys(k.device, k.dtype, shape[3], pv, backend):
            k = prepare_keys(k, *of_k, row_norms, backend) or k
    v = v() if callable(v) else v
    if isinstance(k, Int8Keys):
        means = k.means
    else:
        check_heads(k=k, v=v if isinstance(v, torch.Tensor) else k)
        out = {"out": k} if in_place else {}
        k, _, means, _ = prepare(k, *of_k, BLOCK_K, **out, row_norms=row_norms, backend=backend)
        del out
    if low_bit:
        v = iter([v]) if isinstance(v, torch.Tensor) else v
        kernels, keys, k, v = _in_low_bits(k, v, means, proj, pv, backend, heads or shape[2])
    else:
        keys = _keys(k, v, means, proj, "softmax", False, BLOCK_K, backend, heads)
    q, row_norms = q() if callable(q) else (q, None)
    check_shape("q", q, shape)
    # In 16 bits attention reads the rotated q, which then cannot make room for its linear branch.
    branch = keys.branch if low_bit else None
    out = q if in_place else None
    queries = prepare(q, q_norm, *rotation, eps, BLOCK_Q, low_bit, out, branch, row_norms, backend)
    if not low_bit:
        return _attend(queries, keys, topk, False, block_map, None, BLOCK_Q, BLOCK_K, backend)
    block_map = _block_map(queries, keys, topk, block_map, backend)
    out = queries.rows if branch is None else queries.linear
    return attend_quantized(kernels, queries.blocks, k, v, block_map, out, branch is not None)


class _Keys(NamedTuple):
    """The keys and values, and what is known of them."""

    rows: torch.Tensor | None  # [B, L, H, D]; None where they were quantized
    v: torch.Tensor | None  # [B, L, H, D], likewise
    means: torch.Tensor  # float32 [B, H, N, D], of blocks, less what is near that of all rows
    mean: torch.Tensor | None  # float32 [B, H, D], of all rows; None where they were in int8
    branch: LinearBranch | None  # None without a projection
    v_max: torch.Tensor | None  # float32 [B, H, D], max |v|; in low bits with a branch


def _keys(
    rows: torch.Tensor,
    v: torch.Tensor,
    means: torch.Tensor,
    proj: Pair | None,
    feature_map: str,
    low_bit: bool,
    block_k: int,
    backend: str,
    of_heads: int | None = None,
) -> _Keys:
    """What the queries meet, given the block means [B, H, N, D] of the rows; `of_heads` as in
    key_value_state."""
    means, mean = center_means(means, rows.shape[1], block_k, backend)
    branch = _branch(rows, v, proj, feature_map, low_bit, backend, of_heads)
    return _Keys(rows, v, means, mean, *branch)


def _branch(
    rows: torch.Tensor,
    v: torch.Tensor,
    proj: Pair | None,
    feature_map: str,
    low_bit: bool,
    backend: str,
    of_heads: int | None,
) -> tuple[LinearBranch | None, torch.Tensor | None]:
    """What the linear branch sums up, if there is one, and in low bits the largest values then."""
    if proj is None:
        return None, None
    if not low_bit:
        sums = key_value_state(rows, v, feature_map, backend, of_heads)
        return LinearBranch(*sums, *proj, feature_map), None
    *sums, v_max = key_value_state_and_maximum(rows, v, feature_map, backend, of_heads)
    return LinearBranch(*sums, *proj, feature_map), v_max


def _in_low_bits(
    k: torch.Tensor | Int8Keys,
    parts: Iterator[torch.Tensor],
    means: torch.Tensor,
    proj: Pair | None,
    pv: str,
    backend: str,
    of_heads: int,
) -> tuple[ModuleType, _Keys, Int8Blocks, Pair]:
    """The kernels that attend to the keys k [B, L, H, D] and to the values, whose `parts` are some
    heads after the others; what is known of the keys; and both in low bits.

    Whoever calls holds k, which the last heads of v have to be summed up with.
    """
    in_int8, mean = isinstance(k, Int8Keys), None
    if not in_int8:
        means, mean = center_means(means, k.shape[1], BLOCK_K, backend)
    room = room_for_values(k.shape, pv, means.device)
    branches, scales, heads = [], [], slice(0, 0)
    for v in parts:
        heads = slice(heads.stop, heads.stop + v.shape[2])
        if v.shape == k.shape:
            rows, out = k, room
        else:
            rows, out = k.of(heads) if in_int8 else k[:, :, heads], room[:, heads]
        if in_int8:
            v = _like_keys(v, rows)
            kernels = sage_kernels(v, pv=pv, backend=backend)
        else:
            check_heads(k=rows, v=v)
            kernels = sage_kernels(rows, v, pv=pv, backend=backend)
        if in_int8 and proj is not None:
            bound = sampled_bound(v)
            given = *rows.blocks, rows.center, v, out, bound
            *sums, v_max = state_of_int8_keys(*given, of_heads, backend)
            branch, scale = LinearBranch(*sums, *proj), mend_values(kernels, v, v_max, bound, out)
        else:
            branch, v_max = _branch(rows, v, proj, "softmax", True, backend, of_heads)
            _, scale = kernels.quantize_values(v, PV_DTYPES[pv], BLOCK_K, v_max, out=out)
        branches.append(branch)
        scales.append(scale)
    if heads.stop != k.shape[2]:
        raise ValueError(f"v must have the {k.shape[2]} heads of k, got {heads.stop}")
    del v
    keys = _Keys(None, None, means, mean, _of_all_heads(branches), None)
    blocks = k.blocks if in_int8 else kernels.quantize_keys(k, BLOCK_K, mean)
    scales = scales[0] if len(scales) == 1 else torch.cat(scales, 1)
    return kernels, keys, blocks, (room, scales)


def _like_keys(v: torch.Tensor, keys: Int8Keys) -> torch.Tensor:
    """v if it belongs to these keys; a copy where no tensor map can say how it lies."""
    check_heads(v=v)
    check_shape("v", v, tuple(keys.shape))
    if v.device != keys.center.device:
        raise ValueError(f"v must be on {keys.center.device} like k, got {v.device}")
    if v.dtype != keys.center.dtype:
        raise TypeError(f"v must be {keys.center.dtype} like k, got {v.dtype}")
    mapped = v.stride(3) == 1 and v.stride(2) == v.shape[3] and in_steps_of_16_bytes(v)
    return v if mapped else v.clone(memory_format=torch.contiguous_format)


def _of_all_heads(branches: list[LinearBranch | None]) -> LinearBranch | None:
    """One branch of those of some heads after the others."""
    if branches[0] is None or len(branches) == 1:
        return branches[0]
    state, normalizer = (torch.cat(sums, 1) for sums in list(zip(*branches, strict=True))[:2])
    return branches[0]._replace(state=state, normalizer=normalizer)


def _attend(
    queries: Prepared,
    keys: _Keys,
    topk: float,
    low_bit: bool,
    block_map: torch.Tensor | None,
    pv: str | None,
    block_q: int,
    block_k: int,
    backend: str,
) -> torch.Tensor:
    """Where both ops end: select the blocks, take the linear branch, add the attention."""
    block_map = _block_map(queries, keys, topk, block_map, backend)
    linear = queries.linear
    if linear is None and keys.branch is not None:
        linear = linear_attention(queries.rows, *keys.branch, backend=backend)
    shared = {"block_q": block_q, "block_k": block_k, "linear": linear, "backend": backend}
    if not low_bit:
        return sparse_attention(queries.rows, keys.rows, keys.v, block_map, **shared)
    q = queries.rows if queries.blocks is None else queries.blocks
    known = {"k_mean": keys.mean, "v_max": keys.v_max}
    return sage_attention(q, keys.rows, keys.v, block_map, pv, **known, **shared)


def _block_map(
    queries: Prepared, keys: _Keys, topk: float, block_map: torch.Tensor | None, backend: str
) -> torch.Tensor:
    """The one given, or the key blocks that score best."""
    if block_map is not None:
        return block_map
    count = selected_count(topk, keys.means.shape[2])
    return select_blocks(queries.means, keys.means, count, backend)


def _check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    proj: Pair | None,
    topk: float,
    block_q: int,
    block_k: int,
) -> None:
    """What both ops ask of their inputs."""
    check_heads(q=q, k=k, v=v)
    check_block_shape(block_q, block_k)
    check_topk(topk)
    if proj is not None:
        weight, bias = proj
        check_shape("proj weight", weight, (q.shape[-1], q.shape[-1]))
        check_shape("proj bias", bias, (q.shape[-1],))
