"""Tokens that go through layers at once: as memory allows, and as the GPU is soonest done."""

import pytest
import torch
from turbodiffusion_pack.kernels import int8_linear
from turbodiffusion_pack.kernels.checks import BLOCK
from turbodiffusion_pack.kernels.int8_linear import Tiles, rounds, tiles_of
from turbodiffusion_pack.turbo_core.activation_memory import (
    HIDDEN_BYTES,
    PART_BYTES,
    TEXT_BYTES,
    UNEVEN,
    part_lengths,
    soonest,
    text_bytes,
)

GPU = torch.device("cuda", 0)
UP_AND_DOWN = (13824, 5120), (5120, 13824)  # 14B's feed-forward layers
EACH = HIDDEN_BYTES * 13824
HOPPER, ADA = Tiles(256, 256, 66), Tiles(192, 256, 132)


def all_rounds(tiles, length, at_once):
    """Of the linears up and down, of all parts."""
    full, rest = divmod(length, at_once)
    return [full * rounds(tiles, 1, at_once, n) + rounds(tiles, 1, rest, n) for n, _ in UP_AND_DOWN]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("each", [8 * 1536, EACH])
@pytest.mark.parametrize("length", [1, 128, 8832, 9000, 32760, 75600])
def test_parts_fit_and_are_whole_blocks(length, each, batch):
    lengths = part_lengths(batch, length, each)
    assert all(tokens % BLOCK == 0 for tokens in lengths)
    assert batch * lengths[-1] * each <= PART_BYTES
    assert lengths[0] <= lengths[-1] <= UNEVEN * lengths[0]
    parts = {-(-length // tokens) for tokens in lengths}
    assert len(parts) == 1 and (parts.pop() - 1) * lengths[0] < length


def test_a_block_is_the_least():
    assert [*part_lengths(1, 1000, PART_BYTES)] == [BLOCK]


@pytest.mark.parametrize(("length", "parts"), [(8832, 1), (32760, 2), (75600, 3)])
def test_attention_to_the_text_may_take_an_activation(length, parts):
    room = text_bytes(1, length, 5120)
    assert room == max(PART_BYTES, 2 * length * 5120)
    lengths = part_lengths(1, length, TEXT_BYTES * 5120, room)
    assert {-(-length // tokens) for tokens in lengths} == {parts}
    assert lengths[-1] * TEXT_BYTES * 5120 <= room


@pytest.mark.parametrize(
    ("tiles", "length", "even", "found"),
    [
        (ADA, 32760, [72, 28], [71, 26]),
        (ADA, 75600, [162, 63], [163, 60]),
        (HOPPER, 32760, [108, 40], [105, 39]),
        (HOPPER, 75600, [243, 90], [243, 90]),
    ],
)
def test_fewer_rounds_than_even_parts_take(tiles, length, even, found):
    lengths = part_lengths(1, length, EACH)
    assert all_rounds(tiles, length, lengths[0]) == even
    assert all_rounds(tiles, length, soonest(lengths, 1, length, UP_AND_DOWN, tiles)) == found


def test_rounds():
    assert rounds(ADA, 1, 192, 256) == 1
    assert rounds(ADA, 1, 193, 256 * 66) == 1
    assert rounds(ADA, 1, 193, 256 * 66 + 1) == 2
    assert rounds(ADA, 67, 1, 257) == 2
    assert rounds(ADA, 1, 0, 256) == 0


@pytest.mark.parametrize(
    ("card", "granularity", "tiles"),
    [
        ((8, 0), "rows", (192, 256, 132)),
        ((8, 9), "blocks", (256, 128, 132)),
        ((9, 0), "rows", (256, 256, 66)),
        ((9, 0), "blocks", None),
        ((10, 0), "rows", None),
        ((12, 0), "rows", (192, 256, 132)),
    ],
)
def test_tiles_of_a_card(card, granularity, tiles, monkeypatch):
    monkeypatch.setattr(int8_linear, "triton_unavailable", lambda device: None)
    monkeypatch.setattr(int8_linear.nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(int8_linear, "capability", lambda device: card)
    monkeypatch.setattr(int8_linear, "multiprocessors", lambda device: 132)
    assert tiles_of(GPU, granularity) == tiles
    monkeypatch.setattr(int8_linear.nvrtc, "unavailable", lambda: "no NVRTC here")
    assert tiles_of(GPU, granularity) is None
