"""Which tokens and heads each rank has."""

import pytest
from turbodiffusion_pack.turbo_core.parallel.shares import head_shares, in_blocks, token_shares


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [1024, 1025, 1151, 32760, 75600])
def test_tokens_are_shared_in_whole_blocks(length, ranks):
    shares = token_shares(length, ranks)
    assert [n for share in shares for n in range(share.start, share.stop)] == list(range(length))
    assert all(share.start % 128 == 0 for share in shares)
    blocks = [in_blocks(share) for share in shares]
    sizes = [block.stop - block.start for block in blocks]
    assert sum(sizes) == -(-length // 128) and max(sizes) - min(sizes) <= 1
    assert [b.stop for b in blocks[:-1]] == [b.start for b in blocks[1:]]


def test_no_rank_goes_without_tokens():
    assert token_shares(129, 2) == [slice(0, 128), slice(128, 129)]
    with pytest.raises(ValueError, match="128 tokens are 1 blocks of 128, too few for 2 ranks"):
        token_shares(128, 2)


def test_every_rank_has_as_many_heads():
    assert head_shares(40, 4)[1] == slice(10, 20)
    assert head_shares(12, 3) == [slice(0, 4), slice(4, 8), slice(8, 12)]
    with pytest.raises(ValueError, match=r"12 heads .* 8 ranks: take one of 2, 3, 4, 6, 12 GPUs"):
        head_shares(12, 8)
