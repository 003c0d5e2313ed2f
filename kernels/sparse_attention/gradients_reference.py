"""The gradients of block-sparse attention in plain torch, some blocks at a time and never L x L.

Scores count in powers of two as in reference.py: with S = q k^T / sqrt(D) and the block map's mask,
P = 2^(log2(e) S - lse). All is computed in float32, in float64 if the inputs are.
"""

from collections.abc import Iterator

import torch

from .reference import SCORES, score_scale


def sparse_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int,
    block_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out = P v [B, L, H, D] in q's dtype, and lse [B, H, L]."""
    queries = _blocks(q, block_q) * score_scale(q)
    keys, values = _blocks(k, block_k), _blocks(v, block_k)
    out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:2])
    for chunk, index, hidden in _selected(block_map, q.shape[1], block_q, block_k):
        scores = (queries[chunk] @ _gather(keys, index).mT).masked_fill(hidden, -torch.inf)
        highest = scores.amax(-1, keepdim=True)
        weights = (scores - highest).exp2()
        total = weights.sum(-1, keepdim=True)
        out[chunk] = weights @ _gather(values, index) / total
        lse[chunk] = (highest + total.log2()).squeeze(-1)
    batch, length, heads, _ = q.shape
    return _rows(out, q), lse.reshape(batch, heads, -1)[:, :, :length].contiguous()


def sparse_attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    block_map: torch.Tensor,
    block_q: int,
    block_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dv = P^T d_out, and with dS = P * (d_out v^T - rowsum(d_out * out)): dq = dS k / sqrt(D),
    dk = dS^T q / sqrt(D)."""
    queries, d_rows, rows = (_blocks(x, block_q) for x in (q, d_out, out))
    delta = (d_rows * rows).sum(-1)
    # A row past the end has P = 2^-inf = 0.
    per_row = torch.nn.functional.pad(lse, (0, -q.shape[1] % block_q), value=torch.inf)
    known = queries, d_rows, per_row.reshape(-1, block_q), delta
    keys, values = _blocks(k, block_k), _blocks(v, block_k)
    selected = _selected(block_map, q.shape[1], block_q, block_k)
    dq = _query_gradient(*known, keys, values, selected, score_scale(q))
    dk, dv = _key_gradients(
        *known, keys, values, *transpose_map(block_map, -(-q.shape[1] // block_k)), score_scale(q)
    )
    scale = q.shape[-1] ** -0.5
    return _rows(dq * scale, q), _rows(dk * scale, k), _rows(dv, v)


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
    block_q: int,
    block_k: int,
) -> torch.Tensor:
    """P tv + h v - rowsum(h) * out, where h = P * tS and tS = (tq k^T + q tk^T) / sqrt(D)."""
    scale = q.shape[-1] ** -0.5
    queries, t_queries, rows = (_blocks(x, block_q) for x in (q, tq, out))
    keys, t_keys, values, t_values = (_blocks(x, block_k) for x in (k, tk, v, tv))
    per_row = torch.nn.functional.pad(lse, (0, -q.shape[1] % block_q), value=torch.inf)
    per_row = per_row.reshape(-1, block_q, 1)
    t_out = torch.empty_like(queries)
    for chunk, index, hidden in _selected(block_map, q.shape[1], block_q, block_k):
        key = _gather(keys, index).mT
        scores = (queries[chunk] * score_scale(q)) @ key
        weights = (scores - per_row[chunk]).exp2().masked_fill(hidden, 0)
        t_scores = t_queries[chunk] @ key + queries[chunk] @ _gather(t_keys, index).mT
        h = weights * t_scores * scale
        added = weights @ _gather(t_values, index) + h @ _gather(values, index)
        t_out[chunk] = added - h.sum(-1, keepdim=True) * rows[chunk]
    return _rows(t_out, q)


def transpose_map(block_map: torch.Tensor, n_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of `n_keys` key blocks of a head the query blocks that selected it.

    Blocks count on over samples and heads: block i of head h of sample b is number
    (b * H + h) * N + i.

    Args:
        block_map: int32 [B, H, NQ, count].

    Returns:
        queries: int32 [B * H * NQ * count], the query blocks of one key block after another,
            ascending.
        ends: int32 [B * H * n_keys + 1], where in `queries` those of a key block begin; those of
            the next begin where they end.
    """
    chosen = block_map.flatten(0, 1)  # [B * H, NQ, count]
    heads = torch.arange(len(chosen), dtype=torch.int32, device=chosen.device)
    keys = (chosen + heads[:, None, None] * n_keys).flatten()
    ordered, pairs = keys.sort(stable=True)
    blocks = torch.arange(len(chosen) * n_keys + 1, dtype=torch.int32, device=chosen.device)
    ends = torch.searchsorted(ordered, blocks, out_int32=True)
    return (pairs // block_map.shape[-1]).int(), ends


def _query_gradient(queries, d_rows, lse, delta, keys, values, selected, scale) -> torch.Tensor:
    """dS k [blocks, block_q, D], from rows of all heads in blocks."""
    dq = torch.empty_like(queries)
    for chunk, index, hidden in selected:
        key = _gather(keys, index)
        scores = (queries[chunk] * scale) @ key.mT
        weights = (scores - lse[chunk][..., None]).exp2().masked_fill(hidden, 0)
        d_weights = d_rows[chunk] @ _gather(values, index).mT
        dq[chunk] = (weights * (d_weights - delta[chunk][..., None])) @ key
    return dq


def _key_gradients(
    queries, d_rows, lse, delta, keys, values, lists, ends, scale
) -> tuple[torch.Tensor, torch.Tensor]:
    """dS^T q and P^T d_out [blocks, block_k, D], from rows of all heads in blocks."""
    dk, dv = torch.empty_like(keys), torch.empty_like(values)
    (_, block_q, _), block_k, counts = queries.shape, keys.shape[1], ends.diff()
    place = torch.arange(int(counts.max()), device=ends.device)
    for chunk in _slices(len(keys), SCORES // (block_q * block_k * len(place))):
        at = (ends[:-1][chunk][:, None] + place).clamp_max(len(lists) - 1)
        index = lists[at].long()  # [N, longest]
        past = (place >= counts[chunk][:, None]).repeat_interleave(block_q, 1)[:, None]
        query, d_row = _gather(queries, index), _gather(d_rows, index)  # [N, longest * block_q, D]
        scores = keys[chunk] @ (query * scale).mT  # [N, block_k, longest * block_q]
        weights = (scores - lse[index].flatten(1)[:, None]).exp2().masked_fill(past, 0)
        dv[chunk] = weights @ d_row
        d_weights = values[chunk] @ d_row.mT - delta[index].flatten(1)[:, None]
        dk[chunk] = (weights * d_weights) @ query
    return dk, dv


def _selected(
    block_map: torch.Tensor, length: int, block_q: int, block_k: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some query blocks of all heads at a time, their key blocks [N, count] and which of those keys
    are past the end [N, 1, count * block_k]."""
    index = _of_all_heads(block_map, -(-length // block_k))
    own = block_map.flatten(0, 2)
    for chunk in _slices(len(index), SCORES // (block_q * block_k * index.shape[1])):
        key = own[chunk][..., None] * block_k + torch.arange(block_k, device=index.device)
        yield chunk, index[chunk], (key >= length).flatten(1)[:, None]


def _of_all_heads(index: torch.Tensor, blocks: int) -> torch.Tensor:
    """[B, H, N, count] to [B * H * N, count], of blocks counted on over the heads."""
    index = index.flatten(0, 1).long()
    first = torch.arange(len(index), device=index.device) * blocks
    return (index + first[:, None, None]).flatten(0, 1)


def _slices(length: int, step: int) -> Iterator[slice]:
    """Parts of `length` that are `step` long, at least one."""
    step = max(1, step)
    return (slice(first, first + step) for first in range(0, length, step))


def _gather(blocks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows [N, count * block, D] of the blocks [N, count]."""
    return blocks[index].flatten(1, 2)


def _blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """[B, L, H, D] as [B * H * ceil(L / block), block, D] in at least float32, zeros past L."""
    wide = x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))
    padded = torch.nn.functional.pad(wide, (0, 0, 0, -x.shape[1] % block))
    return padded.reshape(-1, block, x.shape[-1])


def _rows(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What `_blocks` takes apart, contiguous [B, L, H, D] in the dtype of `like`."""
    batch, length, heads, dim = like.shape
    rows = blocks.reshape(batch, heads, -1, dim)[:, :, :length]
    return rows.transpose(1, 2).to(like.dtype).contiguous()
