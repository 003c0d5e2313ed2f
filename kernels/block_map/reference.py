"""Block means and block selection in plain torch."""

import torch


def block_means(x: torch.Tensor, block: int) -> torch.Tensor:
    """Means of [B, L, H, D] over blocks of rows, float32 [B, H, ceil(L / block), D]."""
    return torch.stack([rows.float().mean(1) for rows in x.split(block, 1)], 2)


def center_means(means: torch.Tensor, length: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Means [B, H, N, D] of blocks of rows less the mean of all rows, and that [B, H, D]."""
    rows_last = length - block * (means.shape[2] - 1)
    total = means[:, :, :-1].sum(2) * block + means[:, :, -1] * rows_last
    mean = total / length
    return means - mean[:, :, None], mean


def select_blocks(q_means: torch.Tensor, k_means: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` best scores per row, int32 ascending; ties go to the lower index."""
    scores = q_means @ k_means.mT  # [B, H, NQ, NK]
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return best.sort(-1).values.int()
