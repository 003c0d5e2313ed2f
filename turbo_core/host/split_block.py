"""The fused block on several GPUs: some tokens of all channels, in attention all of some heads.

What travels is INT8 that the block makes anyway: the normed activations to every rank, each of
which multiplies the rows of q, k and v that make its heads, and attention's output to the ranks
whose tokens it is of. In attention nothing is reduced over ranks, as its block map, its linear
branch and its scales are each one head's. Three numbers of a token are of all heads: the sums of
squares that q and k are normed by, and, with a scale per token, the largest output. So all is what
one GPU makes of it, bit for bit; but on Hopper, where a rank's heads are no whole tiles of its
linear (14B on 8 GPUs, 1.3B on 4), q and k are squared after rounding, not before.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from ...kernels.int8_quant import quantize_blocks, quantize_rows
from ...kernels.qk_prepare import square_sums
from ..parallel.exchange import Ranks, columns_to_rows, gather, largest, summed
from ..parallel.shares import head_shares, in_blocks, token_shares
from .epilogue import Operands
from .operations import int8_product
from .options import SPLIT
from .self_attention import SomeHeads, attend


class Split(NamedTuple):
    """One forward pass that `ranks` share."""

    ranks: Ranks

    def tokens_into(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What block `index` takes of x: the first one this rank's tokens of [B, L, C]."""
        if index > 0:
            return x
        return x[:, token_shares(x.shape[1], self.ranks.count)[self.ranks.rank]]


def split_attend(
    attn, index, x, normed: Callable, granularity: str, freqs, transformer_options: dict
) -> Operands:
    """Self-attention of block `index`, from this rank's tokens x [B, l, C] to those of its output.

    `normed()` gives x in INT8, scales in `granularity`; so is the result, which `o` takes. The
    rotation `freqs` [1, L, 1, D/2, 2, 2] is that of all tokens.
    """
    ranks = transformer_options[SPLIT].ranks
    shares = _operand_shares(token_shares(freqs.shape[1], ranks.count), granularity)
    channels = channels_of(attn, ranks)

    def gathered():
        return gather(ranks, list(normed()), shares)

    def project(op, n, out, **squares):
        return int8_product(op, n, x.dtype, channels, out=out, **squares)  # [B, L, c]

    some = SomeHeads(channels, functools.partial(_total, ranks))
    y = attend(attn, index, x, gathered, project, freqs, transformer_options, some)
    if granularity == "blocks":
        return tuple(columns_to_rows(ranks, list(quantize_blocks(y)), shares))
    amax = torch.linalg.vector_norm(y, torch.inf, dim=-1, dtype=torch.float32)  # [B, L]
    y, scale = quantize_rows(y, amax=largest(ranks, amax))
    own = shares[0][ranks.rank]
    return columns_to_rows(ranks, [y], shares[:1])[0], scale[:, own].contiguous()


def _operand_shares(tokens: list[slice], granularity: str) -> list[list[slice]]:
    """Each rank's rows of quantized activations and of their scales."""
    return [tokens, tokens if granularity == "rows" else [in_blocks(share) for share in tokens]]


def channels_of(attn, ranks: Ranks) -> slice:
    """The channels of this rank's heads."""
    heads = head_shares(attn.num_heads, ranks.count)[ranks.rank]
    return slice(heads.start * attn.head_dim, heads.stop * attn.head_dim)


def _total(ranks: Ranks, x: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
    """The sums of squares over all heads, float64 [B, 1, L], of this rank's [B, L, h, D] and its
    `squares` [B, P, L], where they are known.

    As good as exact in float64: one rank that has all the heads gets the same.
    """
    squares = square_sums(x).mT if squares is None else squares
    return summed(ranks, squares.double().sum(1, keepdim=True))
