"""The linear branch of SLA: every key, at a cost that does not grow with L squared."""

from typing import NamedTuple

import torch

from ..checks import check_heads, check_shape, float32_on_gpu, not_contiguous
from ..dispatch import choose, has_triton
from . import reference

if has_triton():
    from . import triton as triton_kernels
else:
    triton_kernels = None

FEATURE_MAPS = ("softmax", "elu", "relu")

__all__ = [
    "FEATURE_MAPS",
    "LinearBranch",
    "check_branch",
    "check_feature_map",
    "key_value_state",
    "key_value_state_and_maximum",
    "linear_attention",
]


class LinearBranch(NamedTuple):
    """What the linear branch needs besides the queries; see `linear_attention`."""

    state: torch.Tensor
    normalizer: torch.Tensor
    proj_weight: torch.Tensor
    proj_bias: torch.Tensor
    feature_map: str = "softmax"


def key_value_state(
    k: torch.Tensor, v: torch.Tensor, feature_map: str = "softmax", backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over all keys of phi(k)^T v and of phi(k) (SLA, arXiv 2512.16093, section 1.1).

    Args:
        k, v: [B, L, H, D], float32, float16 or bfloat16; k before any smoothing.
        feature_map: phi: "softmax" over the channels, "elu" (plus one) or "relu".
        backend: see `dispatch.choose`.

    Returns:
        state float32 [B, H, D, D] (channels of k, channels of v), normalizer float32 [B, H, D].

    Raises:
        ValueError, TypeError: a shape, dtype or the feature map does not fit.
    """
    return _kernels(k, v, feature_map, backend).key_value_state(k, v, feature_map)


def key_value_state_and_maximum(
    k: torch.Tensor, v: torch.Tensor, feature_map: str = "softmax", backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`key_value_state` and max |v| over all keys, in one pass over v.

    Args:
        k, v, feature_map, backend: see `key_value_state`.

    Returns:
        state float32 [B, H, D, D], normalizer float32 [B, H, D], maximum float32 [B, H, D].

    Raises:
        ValueError, TypeError: as `key_value_state`.
    """
    return _kernels(k, v, feature_map, backend).key_value_state_and_maximum(k, v, feature_map)


def _kernels(k, v, feature_map, backend):
    """The module that sums over these keys, once they are known to fit."""
    check_heads(k=k, v=v)
    check_feature_map(feature_map)
    unsupported = not_contiguous(k, v), float32_on_gpu(k)
    return choose("key_value_state", backend, k, reference, triton_kernels, unsupported=unsupported)


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
