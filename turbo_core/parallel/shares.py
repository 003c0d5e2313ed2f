"""Which tokens and which heads are whose.

Between attentions a rank has some tokens with all channels, in attention all tokens with some heads
(Ulysses, arXiv 2309.14509). Both shares are whole blocks of 128: nothing is padded, and every block
map and every scale is of the blocks that it is of on one GPU.
"""

import itertools

from ...kernels.checks import BLOCK


def token_shares(length: int, ranks: int) -> list[slice]:
    """Each rank's tokens of `length`, in order: whole blocks, the last one as long as it is.

    Raises:
        ValueError: there are fewer blocks than ranks.
    """
    blocks = -(-length // BLOCK)
    if blocks < ranks:
        raise ValueError(
            f"{length} tokens are {blocks} blocks of {BLOCK}, too few for {ranks} ranks: run this "
            "video on fewer GPUs"
        )
    shares = _even(blocks, ranks)
    return [slice(s.start * BLOCK, min(s.stop * BLOCK, length)) for s in shares]


def head_shares(heads: int, ranks: int) -> list[slice]:
    """Each rank's heads, as many for each.

    Raises:
        ValueError: the number of ranks does not divide that of the heads.
    """
    if heads % ranks:
        fitting = ", ".join(str(n) for n in range(2, heads + 1) if heads % n == 0)
        raise ValueError(
            f"{heads} heads cannot be shared evenly by {ranks} ranks: take one of {fitting} GPUs"
        )
    return _even(heads, ranks)


def in_blocks(share: slice) -> slice:
    """The blocks of 128 that a share of tokens or channels covers."""
    return slice(share.start // BLOCK, -(-share.stop // BLOCK))


def _even(count: int, ranks: int) -> list[slice]:
    """`count` things shared out in order, the first ranks with one more where some are left."""
    each, more = divmod(count, ranks)
    ends = [0]
    for rank in range(ranks):
        ends.append(ends[-1] + each + (rank < more))
    return [slice(*pair) for pair in itertools.pairwise(ends)]
