"""Random inputs for the attention tests, and float64 formulas written without any blocks."""

import torch
from devices import DEVICE

BLOCK_SHAPES = ((128, 64), (64, 64), (64, 128))


def random_qkv(batch, length, heads, dim, dtype=torch.float32):
    """q, k, v [B, L, H, D], strided views; neighbours are alike, so that blocks differ."""
    scene = torch.randn(batch, 1 + length // 24, heads, 3, dim)
    scene = scene.repeat_interleave(24, 1)[:, :length]
    return (scene + torch.randn(batch, length, heads, 3, dim)).to(DEVICE, dtype).unbind(3)


def random_proj(dim):
    """A projection's weight [D, D] and bias [D]."""
    return 0.1 * torch.randn(dim, dim, device=DEVICE), 0.1 * torch.randn(dim, device=DEVICE)


def random_map(batch, length, heads, block_q, block_k, share=0.4):
    """A random block map, int32 [B, H, NQ, count], ascending."""
    n_queries, n_keys = -(-length // block_q), -(-length // block_k)
    count = max(1, int(share * n_keys))
    order = torch.rand(batch, heads, n_queries, n_keys).argsort(-1)[..., :count]
    return order.sort(-1).values.int().to(DEVICE)


def selected_keys(block_map, length, block_q, block_k):
    """Which key each query sees, bool [B, H, L, L]."""
    n_keys = -(-length // block_k)
    blocks = torch.zeros(*block_map.shape[:3], n_keys, dtype=torch.bool, device=block_map.device)
    blocks = blocks.scatter(-1, block_map.long(), True)
    keys = blocks.repeat_interleave(block_q, 2).repeat_interleave(block_k, 3)
    return keys[:, :, :length, :length]


def exact_sparse(q, k, v, block_map, block_q=128, block_k=64, scale=None):
    """Masked softmax attention in float64, [B, L, H, D]; one head at a time, for memory's sake."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def head(*own):
        seen = selected_keys(block_map[own][None, None], q.shape[2], block_q, block_k)[0, 0]
        scores = q[own] @ k[own].mT * scale
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v[own]

    samples = [torch.stack([head(b, h) for h in range(q.shape[1])], 1) for b in range(len(q))]
    return torch.stack(samples)


def phi(x, feature_map):
    """The feature maps of the paper."""
    if feature_map == "softmax":
        return x.exp() / x.exp().sum(-1, keepdim=True)
    if feature_map == "elu":
        return torch.where(x > 0, x + 1, x.exp())
    return x.clamp_min(0)


def linear_branch(q, k, v, weight, bias, feature_map):
    """The linear branch as the paper writes it, in the inputs' dtype, [B, L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    phi_q, phi_k = phi(q, feature_map), phi(k, feature_map)
    divisor = 1e-5 + phi_q @ phi_k.sum(2)[..., None]
    out = phi_q @ (phi_k.mT @ v) / divisor
    return (out @ weight.to(q.dtype).T + bias.to(q.dtype)).transpose(1, 2)


def exact_linear(q, k, v, weight, bias, feature_map):
    """The linear branch in float64."""
    return linear_branch(q.double(), k.double(), v.double(), weight, bias, feature_map)


def exact_means(x, block, center=0):
    """Float64 means [B, H, N, D] of every block's own rows."""
    x = x.double().transpose(1, 2) - center
    starts = range(0, x.shape[2], block)
    return torch.stack([x[:, :, s : s + block].mean(2) for s in starts], 2)


def exact_scores(q, k, block_q=128, block_k=64):
    """What blocks are selected by: products of means, K centered, [B, H, NQ, NK] in float64."""
    mean = k.double().mean(1)[:, :, None]
    return exact_means(q, block_q) @ exact_means(k, block_k, mean).mT


def misplaced(chosen, scores):
    """How far a selection lies from the count-th best score, in units of the row's std.

    chosen [..., count]; 0 where the selection is the best one.
    """
    count = chosen.shape[-1]
    bound = scores.topk(count, -1).values[..., -1:]
    gap = (bound - scores.gather(-1, chosen.long())).clamp_min(0).amax(-1)
    return (gap / scores.std(-1).clamp_min(1e-12)).max().item()
