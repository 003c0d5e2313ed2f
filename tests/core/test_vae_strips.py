"""Strips of a video for its VAE, and copies between a GPU and memory, without a VAE."""

import pack  # noqa: F401
import pytest
import torch
from turbodiffusion_pack.turbo_core.staging import FromMemory, ToMemory
from turbodiffusion_pack.turbo_core.vae_strips import (
    MOST_STRIPS,
    Level,
    Strip,
    halos,
    strip_bytes,
    strips_of,
    strips_within,
)

# Of Wan's decoder above the latents' size.
WAN = [Level(2, 2, (192, *[384] * 5), 384, 7), Level(4, 4, (192,) * 6, 384, 7)]
WAN += [Level(8, 4, (96,) * 7, 192, 8)]
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.mark.parametrize("size", [(1, 1), (60, 104), (90, 160), (160, 90), (3, 7)])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_strips_lie_side_by_side_across_the_longer_side(size, count):
    strips = strips_of(*size, count)
    axis = 2 if size[0] > size[1] else 3
    assert len(strips) == min(count, max(size))
    assert {strip.axis for strip in strips} == {axis}
    covered = [n for strip in strips for n in range(strip.first, strip.last)]
    assert covered == list(range(max(size)))
    widths = [strip.last - strip.first for strip in strips]
    assert max(widths) - min(widths) <= 1


def test_halos_are_what_the_levels_to_come_look_sideways():
    """7 / 2 + 7 / 4 + 8 / 8 latents, then 7 / 4 + 8 / 8, then 8 / 8, rounded up."""
    assert halos(WAN) == [7, 3, 1, 0]
    strip = Strip(3, 40, 80, 160)
    assert [strip.wider(halo) for halo in (7, 0)] == [(33, 87), (40, 80)]
    assert Strip(3, 0, 80, 84).wider(7) == (0, 84)


def test_a_levels_memory_is_its_frames_and_those_it_carries():
    """One convolution of 3 channels at two pixels a latent, one frame: 5 frames and 2 carried."""
    level = Level(2, 1, (3,), 0, 0)
    pixels = (2 * 4) * (2 * 5)
    assert strip_bytes([level], Strip(3, 0, 4, 9), 5, 2) == 2 * pixels * 3 * (5 + 2)


def test_the_fewest_strips_that_fit():
    def need(count):
        return 12 / count

    assert [strips_within(need, free) for free in (99, 12, 11, 4)] == [1, 1, 2, 3]
    assert strips_within(need, 0) == MOST_STRIPS


@pytest.mark.parametrize("device", DEVICES)
def test_pieces_reach_memory(device):
    pieces = [torch.full((2, 3, 4), float(n), device=device) for n in range(5)]
    out = torch.zeros(5, 2, 8, 4)
    memory = ToMemory()
    for n, piece in enumerate(pieces):
        memory.copy(piece, out[n, :, 2:5])
        piece.fill_(-1)  # the GPU is free to go on with it
    memory.finish()
    assert [float(x) for x in out[:, 0, 3, 0]] == [0, 1, 2, 3, 4]
    assert not out[:, :, :2].any()


@pytest.mark.parametrize("device", DEVICES)
def test_pieces_come_from_memory(device):
    video = torch.arange(60.0).view(5, 4, 3)
    memory = FromMemory(torch.device(device))
    for n in range(5):
        piece = memory.copy(video[n, 1:3])
        assert piece.device.type == device
        assert piece.is_contiguous()
        assert torch.equal(piece.cpu(), video[n, 1:3])
