"""The linear branch in plain torch."""

import torch

EPS = 1e-5  # in the denominator, as in the paper
ROWS = 8192  # rows at a time, so that the float32 copies stay small


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in what sums are computed in: float32, float64 if x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def apply_feature_map(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi of float32 rows [..., D]."""
    if feature_map == "softmax":
        return x.softmax(-1)
    if feature_map == "elu":
        return torch.nn.functional.elu(x) + 1
    return x.relu()


def key_value_state(
    k: torch.Tensor, v: torch.Tensor, feature_map: str, of_heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over keys: state float32 [B, H, D, D] and normalizer float32 [B, H, D]."""
    batch, _, heads, dim = k.shape
    state = wide(k.new_zeros(batch, heads, dim, dim))
    normalizer = wide(k.new_zeros(batch, heads, dim))
    for k_rows, v_rows in zip(k.split(ROWS, 1), v.split(ROWS, 1), strict=True):
        phi = apply_feature_map(wide(k_rows), feature_map)
        state += torch.einsum("blhc,blhd->bhcd", phi, wide(v_rows))
        normalizer += phi.sum(1)
    return state, normalizer


def key_value_state_and_maximum(
    k: torch.Tensor, v: torch.Tensor, feature_map: str, of_heads: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same, and max |v| over the keys, float32 [B, H, D]."""
    return *key_value_state(k, v, feature_map), v.abs().amax(1).float()


def linear_rows(
    q: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    feature_map: str,
) -> torch.Tensor:
    """The linear branch of one head's rows [L, D], float32; state [D, D], normalizer [D]."""
    phi = apply_feature_map(wide(q), feature_map)
    mixed = phi @ (state @ proj_weight.to(state.dtype).T)
    return mixed / (EPS + phi @ normalizer)[:, None] + wide(proj_bias)


def linear_attention(
    q: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    feature_map: str,
) -> torch.Tensor:
    """The linear branch of [B, L, H, D], in q's dtype."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            out[b, :, h] = linear_rows(
                q[b, :, h], state[b, h], normalizer[b, h], proj_weight, proj_bias, feature_map
            )
    return out
