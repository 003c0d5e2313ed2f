"""The gradients of the linear branch in plain torch.

With r = phi(q) / (1e-5 + phi(q) normalizer) and G = state W^T the branch is y = r G + b. All is
computed in float32, in float64 if the inputs are.
"""

import torch

from .reference import EPS, ROWS, apply_feature_map, wide


def query_gradients(
    q: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    proj_weight: torch.Tensor,
    feature_map: str,
    d_out: torch.Tensor,
    onto: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add q's gradient to `onto`; sums over queries dG = r^T dy [B, H, D, D], those for the
    normalizer [B, H, D], and those for the bias [D]."""
    mix = state @ proj_weight.to(state.dtype).T
    d_mix, d_normalizer = torch.zeros_like(mix), torch.zeros_like(normalizer)
    for rows, d_rows, onto_rows in _parts(q, d_out, onto):
        phi = apply_feature_map(_by_heads(rows), feature_map)  # [B, H, R, D]
        d_y = _by_heads(d_rows)
        divisor = EPS + phi @ normalizer[..., None]  # [B, H, R, 1]
        weights, d_weights = phi / divisor, d_y @ mix.mT
        delta = (weights * d_weights).sum(-1, keepdim=True)
        d_mix += weights.mT @ d_y
        d_normalizer -= (weights * delta).sum(2)
        d_phi = (d_weights - delta * normalizer[:, :, None]) / divisor
        _add(onto_rows, through_feature_map(phi, d_phi, feature_map))
    return d_mix, d_normalizer, d_out.sum((0, 1, 2), dtype=state.dtype)


def key_gradients(
    k: torch.Tensor,
    v: torch.Tensor,
    d_state: torch.Tensor,
    d_normalizer: torch.Tensor,
    feature_map: str,
    onto: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Add the gradients of k and v to `onto`, given those of the sums over keys."""
    for k_rows, v_rows, onto_k, onto_v in _parts(k, v, *onto):
        phi = apply_feature_map(_by_heads(k_rows), feature_map)  # [B, H, R, D]
        d_phi = _by_heads(v_rows) @ d_state.mT + d_normalizer[:, :, None]
        _add(onto_k, through_feature_map(phi, d_phi, feature_map))
        _add(onto_v, phi @ d_state)


def state_jvp(
    k: torch.Tensor, v: torch.Tensor, tk: torch.Tensor, tv: torch.Tensor, feature_map: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tangents [B, H, D, D] and [B, H, D] of the sums over keys."""
    t_state = t_normalizer = 0
    for rows in _parts(k, v, tk, tv):
        k_rows, v_rows, tk_rows, tv_rows = map(_by_heads, rows)
        phi = apply_feature_map(k_rows, feature_map)
        t_phi = through_feature_map(phi, tk_rows, feature_map)
        t_state = t_state + t_phi.mT @ v_rows + phi.mT @ tv_rows
        t_normalizer = t_normalizer + t_phi.sum(2)
    return t_state, t_normalizer


def rows_jvp(
    q: torch.Tensor,
    tq: torch.Tensor,
    mix: torch.Tensor,
    t_mix: torch.Tensor,
    normalizer: torch.Tensor,
    t_normalizer: torch.Tensor,
    t_bias: torch.Tensor,
    feature_map: str,
) -> torch.Tensor:
    """Tangent [B, L, H, D] of r G + b, in q's dtype; `mix` is G."""
    t_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for q_rows, tq_rows, t_rows in _parts(q, tq, t_out):
        phi = apply_feature_map(_by_heads(q_rows), feature_map)
        t_phi = through_feature_map(phi, _by_heads(tq_rows), feature_map)
        divisor = EPS + phi @ normalizer[..., None]
        t_divisor = t_phi @ normalizer[..., None] + phi @ t_normalizer[..., None]
        weights = phi / divisor
        t_weights = (t_phi - weights * t_divisor) / divisor
        t_rows.copy_((t_weights @ mix + weights @ t_mix + t_bias).transpose(1, 2))
    return t_out


def through_feature_map(phi: torch.Tensor, change: torch.Tensor, feature_map: str) -> torch.Tensor:
    """`change` [..., D] times the derivative of phi at the rows that it gave `phi`.

    That is a symmetric matrix, so it serves gradients and tangents alike.
    """
    if feature_map == "softmax":
        return phi * (change - (change * phi).sum(-1, keepdim=True))
    if feature_map == "elu":
        return change * phi.clamp_max(1)
    return change * (phi > 0)


def _parts(*tensors: torch.Tensor):
    """Some rows at a time of tensors [B, L, H, D], views."""
    return zip(*(x.split(ROWS, 1) for x in tensors), strict=True)


def _by_heads(rows: torch.Tensor) -> torch.Tensor:
    """[B, R, H, D] as [B, H, R, D] in at least float32."""
    return wide(rows.transpose(1, 2))


def _add(onto: torch.Tensor, change: torch.Tensor) -> None:
    """Add [B, H, R, D] to rows [B, R, H, D], rounded once."""
    onto.copy_(onto + change.transpose(1, 2))
