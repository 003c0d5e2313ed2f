"""The linear branch of SLA: every key, at a cost that does not grow with L squared."""

from types import ModuleType
from typing import NamedTuple

import torch

from ..checks import check_heads, check_shape, float32_on_gpu, not_contiguous
from ..dispatch import choose, has_triton
from . import gradients_reference, reference

if has_triton():
    from . import gradients_triton, hopper, mma
    from . import triton as triton_kernels
else:
    gradients_triton = triton_kernels = hopper = mma = None

FEATURE_MAPS = ("softmax", "elu", "relu")
KEY_BLOCK = 64  # rows of k in int8 that share a scale

__all__ = [
    "FEATURE_MAPS",
    "LinearBranch",
    "check_branch",
    "check_feature_map",
    "key_value_state",
    "key_value_state_and_maximum",
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_jvp",
    "state_of_int8_keys",
]


class LinearBranch(NamedTuple):
    """What the linear branch needs besides the queries; see `linear_attention`."""

    state: torch.Tensor
    normalizer: torch.Tensor
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor
    feature_map: str = "softmax"


def key_value_state(
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str = "softmax",
    backend: str = "auto",
    of_heads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over all keys of phi(k)^T v and of phi(k) (SLA, arXiv 2512.16093, section 1.1).

    Args:
        k, v: [B, L, H, D], float32, float16 or bfloat16; k before any smoothing.
        feature_map: phi: "softmax" over the channels, "elu" (plus one) or "relu".
        backend: see `dispatch.choose`.
        of_heads: how many heads the attention has that these are some of: they add up in the
            order in which they would among the others. None where these are all.

    Returns:
        state float32 [B, H, D, D] (channels of k, channels of v), normalizer float32 [B, H, D].

    Raises:
        ValueError, TypeError: a shape, dtype or the feature map does not fit.
    """
    kernels = _kernels(k, v, feature_map, backend)
    return kernels.key_value_state(k, v, feature_map, of_heads)


def key_value_state_and_maximum(
    k: torch.Tensor,
    v: torch.Tensor,
    feature_map: str = "softmax",
    backend: str = "auto",
    of_heads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`key_value_state` and max |v| over all keys, in one pass over v.

    Args:
        k, v, feature_map, backend, of_heads: see `key_value_state`.

    Returns:
        state float32 [B, H, D, D], normalizer float32 [B, H, D], maximum float32 [B, H, D].

    Raises:
        ValueError, TypeError: as `key_value_state`.
    """
    kernels = _kernels(k, v, feature_map, backend)
    return kernels.key_value_state_and_maximum(k, v, feature_map, of_heads)


def state_of_int8_keys(
    integers: torch.Tensor,
    scale: torch.Tensor,
    center: torch.Tensor,
    v: torch.Tensor,
    values: torch.Tensor,
    bound: torch.Tensor,
    of_heads: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`key_value_state_and_maximum` of keys as `prepare_keys` leaves them, and v in low bits.

    Args:
        integers, scale, center: see `Int8Keys`; int8 [B, H, N * 64, D], float32 [B, H, N] and, in
            v's dtype, [B, H, D]. Where B is 1 they may be some heads of larger tensors.
        v, of_heads, backend: see `key_value_state`; phi is "softmax", D 128, v's heads lie side by
            side.
        values: takes v in e4m3 or float16 [B, H, N, D, 64] as attention in CUDA C++ reads it; some
            heads of a larger tensor where the keys are.
        bound: float32 [B, H, D], what maps to the largest value; larger |v| saturates, and shows in
            the maximum.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit, or no CUDA C++ takes this v here.
    """
    batch, length, heads, dim = v.shape
    blocks, rows = -(-length // KEY_BLOCK), KEY_BLOCK
    check_shape("integers", integers, (batch, heads, blocks * rows, dim))
    check_shape("scale", scale, (batch, heads, blocks))
    check_shape("center", center, (batch, heads, dim))
    check_shape("values", values, (batch, heads, blocks, dim, rows))
    check_shape("bound", bound, (batch, heads, dim))
    kernels = _kernels(v, v, "softmax", backend)
    if kernels is None or kernels not in (hopper, mma):
        raise ValueError("keys in int8 are summed up in CUDA C++, which does not take this v here")
    _check_dtype("integers", integers, torch.int8)
    _check_dtype("scale", scale, torch.float32)
    _check_dtype("center", center, v.dtype)
    _check_dtype("values", values, *kernels.VALUES)
    _check_dtype("bound", bound, torch.float32)
    return kernels.state_of_int8_keys(integers, scale, center, v, values, bound, of_heads)


def _check_dtype(name: str, x: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Require that `x` is of one of these."""
    if x.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {x.dtype}")


def _kernels(k, v, feature_map, backend):
    """The module that sums over these keys, once they are known to fit."""
    check_heads(k=k, v=v)
    check_feature_map(feature_map)
    unsupported = not_contiguous(k, v), float32_on_gpu(k)
    return choose(
        "key_value_state", backend, k, reference, triton_kernels, hopper, mma,
        unsupported=unsupported, operands=(k, v, feature_map),
    )  # fmt: skip


def linear_attention(
    q: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    feature_map: str = "softmax",
    backend: str = "auto",
) -> torch.Tensor:
    """The projected linear branch, proj(phi(q) state / (1e-5 + phi(q) normalizer)).

    Computed as phi(q) (state W^T) / (...) + b, the same by linearity.

    Args:
        q: [B, L, H, D], float32, float16 or bfloat16.
        state: float32 [B, H, D, D].
        normalizer: float32 [B, H, D].
        proj_weight: W [D, D] (out, in), any float dtype.
        proj_bias: b [D], any float dtype.
        feature_map: phi, as in `key_value_state`.
        backend: see `dispatch.choose`.

    Returns:
        [B, L, H, D] in q's dtype.

    Raises:
        ValueError, TypeError: a shape, dtype or the feature map does not fit.
    """
    check_heads(q=q)
    branch = LinearBranch(state, normalizer, proj_weight, proj_bias, feature_map)
    check_branch(q, branch)
    unsupported = not_contiguous(q), float32_on_gpu(q)
    kernels = choose(
        "linear_attention", backend, q, reference, triton_kernels, unsupported=unsupported
    )
    return kernels.linear_attention(q, *branch)


def linear_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    branch: LinearBranch,
    d_out: torch.Tensor,
    onto: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `linear_attention` of q with the `key_value_state` of k and v.

    With G = state W^T and the queries' weights r one D x D sum dG = r^T dy gives both d(state) =
    dG W and dW = sum of dG^T state over batch and heads. Sums are float32 and taken in a fixed
    order: the same inputs give the same bits.

    Args:
        q, k, v: [B, L, H, D], what the forward took.
        branch: the sums over k and v, and the projection.
        d_out: the gradient for the branch, [B, L, H, D] in q's dtype.
        onto: contiguous [B, L, H, D] in q's dtype: the gradients of q, k and v are added to them in
            place, so that those of `sparse_attention` need no pass of their own.
        backend: see `dispatch.choose`.

    Returns:
        The gradients of proj_weight [D, D] and proj_bias [D], float32.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    dq, dk, dv = onto
    check_heads(q=q, k=k, v=v, d_out=d_out, dq=dq, dk=dk, dv=dv)
    check_branch(q, branch)
    if not all(x.is_contiguous() for x in onto):
        raise ValueError("onto must be contiguous, got strides " + str([x.stride() for x in onto]))
    kernels = _gradient_kernels("linear_attention_backward", backend, q, k, v, d_out)
    state, normalizer, weight, _, feature_map = branch
    d_mix, d_normalizer, d_bias = kernels.query_gradients(
        q, state, normalizer, weight, feature_map, d_out, dq
    )  # fmt: skip
    d_state = d_mix @ weight.to(d_mix.dtype)
    kernels.key_gradients(k, v, d_state, d_normalizer, feature_map, (dk, dv))
    return (d_mix.mT @ state).sum((0, 1)), d_bias


def linear_attention_jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    branch: LinearBranch,
    tangents: tuple[torch.Tensor, ...],
    backend: str = "auto",
) -> torch.Tensor:
    """The change of `linear_attention` of q with the `key_value_state` of k and v (forward mode).

    Args:
        q, k, v, branch: see `linear_attention_backward`.
        tangents: of q, k and v [B, L, H, D] in q's dtype, of proj_weight [D, D] and proj_bias [D].
        backend: see `dispatch.choose`.

    Returns:
        [B, L, H, D] in q's dtype.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    tq, tk, tv, t_weight, t_bias = tangents
    check_heads(q=q, k=k, v=v, tq=tq, tk=tk, tv=tv)
    check_branch(q, branch)
    kernels = _gradient_kernels("linear_attention_jvp", backend, q, k, v, tq, tk, tv)
    state, normalizer, weight, _, feature_map = branch
    t_state, t_normalizer = kernels.state_jvp(k, v, tk, tv, feature_map)
    weight, t_weight = weight.to(state.dtype), t_weight.to(state.dtype)
    mixes = state @ weight.T, t_state @ weight.T + state @ t_weight.T
    return kernels.rows_jvp(q, tq, *mixes, normalizer, t_normalizer, t_bias, feature_map)


def _gradient_kernels(op: str, backend: str, *rows: torch.Tensor) -> ModuleType:
    """The module that runs `op` on [B, L, H, D] tensors."""
    unsupported = not_contiguous(*rows), float32_on_gpu(rows[0])
    return choose(
        op, backend, rows[0], gradients_reference, gradients_triton, unsupported=unsupported
    )


def check_branch(q: torch.Tensor, branch: LinearBranch) -> None:
    """Require that a linear branch fits the queries [B, L, H, D]."""
    batch, _, heads, dim = q.shape
    check_feature_map(branch.feature_map)
    check_shape("state", branch.state, (batch, heads, dim, dim))
    check_shape("normalizer", branch.normalizer, (batch, heads, dim))
    check_shape("proj_weight", branch.proj_weight, (dim, dim))
    check_shape("proj_bias", branch.proj_bias, (dim,))


def check_feature_map(feature_map: str) -> None:
    """Require a feature map of the paper."""
    if feature_map not in FEATURE_MAPS:
        raise ValueError(
            f"feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}"
        )
