"""How a causal video VAE is cut into strips, and the memory that it then takes.

A strip goes through all frames before the next one does, so the frames that the convolutions carry
over are those of one strip. It is wider than what it gives by what its convolutions look sideways,
less so on every level, so the result is that of the whole.
"""

import itertools
import math
from typing import NamedTuple

LATENT = 8  # pixels in a row for one of the latents
# More strips are taken rather than more bytes than this: two cost a twentieth of the time of one,
# and what they leave free keeps a diffusion model's weights on the GPU.
COMFORTABLE = 4.5e9
MOST_STRIPS = 8
# What an allocator loses between tensors, and the convolutions' own workspaces.
SLACK = 1.18  # an H100 took 1.165 with four strips


class Level(NamedTuple):
    """Layers at one size of frames.

    Attributes:
        scale: pixels in a row for one of the latents.
        frames: for one frame of the latents.
        channels: that each causal convolution reads.
        resampled: channels of what is resampled on this level, 0 where nothing is.
        reach: pixels that all of the level's convolutions together look sideways.
    """

    scale: int
    frames: int
    channels: tuple[int, ...]
    resampled: int
    reach: int


class Strip(NamedTuple):
    """Latents from `first` to before `last` of `size`, in rows (axis 2) or columns (axis 3)."""

    axis: int
    first: int
    last: int
    size: int

    def wider(self, halo: int) -> tuple[int, int]:
        """First and last with `halo` more on both sides, as far as there are latents."""
        return max(0, self.first - halo), min(self.size, self.last + halo)


def strips_of(height: int, width: int, count: int) -> list[Strip]:
    """`count` strips across the longer side of latents [height, width], about equally wide."""
    axis, size = (2, height) if height > width else (3, width)
    count = min(count, size)
    edges = [size * i // count for i in range(count + 1)]
    return [Strip(axis, a, b, size) for a, b in itertools.pairwise(edges)]


def halos(levels: list[Level]) -> list[int]:
    """Latents beside a strip that it needs where each of the levels begins, and 0 at the end."""
    reaches = [level.reach / level.scale for level in levels]
    return [math.ceil(sum(reaches[k:])) for k in range(len(levels) + 1)]


def strip_bytes(levels: list[Level], strip: Strip, across: int, itemsize: int) -> float:
    """Memory of a strip's levels, `across` latents long the other way, while one piece runs."""
    carried, working = 0, 0
    for level, halo in zip(levels, halos(levels), strict=False):
        first, last = strip.wider(halo)
        pixels = (last - first) * across * level.scale**2
        carried += 2 * pixels * sum(level.channels)
        working = max(working, pixels * _values(level))
    return itemsize * (carried + working)


def _values(level: Level) -> int:
    """Values a pixel while the level's largest layer runs: x and y, and what y is made of."""
    channels = max(level.channels)
    frames = level.frames
    return max((3 * frames + 2) * channels, frames * (level.resampled + 2 * channels))


def video_bytes(
    levels: list[Level], whole: Level, latents: tuple[int, int, int], count: int, itemsize: int
) -> float:
    """Memory beside the weights to decode or encode a video in `count` strips.

    Args:
        levels: those that strips run.
        whole: the level of the latents, which runs at once.
        latents: frames, height and width.
        count: strips.
        itemsize: bytes of a value.
    """
    frames, height, width = latents
    strips = strips_of(height, width, count)
    features = itemsize * frames * height * width * max(whole.channels)
    at_once = strip_bytes([whole], Strip(3, 0, width, width), height, itemsize)
    across = width if strips[0].axis == 2 else height
    widest = max(strip_bytes(levels, strip, across, itemsize) for strip in strips)
    return SLACK * (features + max(at_once, widest))


def strips_within(need, free: float) -> int:
    """The fewest strips whose need(count), in bytes, fits into `free`; the most if none does."""
    return next((n for n in range(1, MOST_STRIPS) if need(n) <= free), MOST_STRIPS)
