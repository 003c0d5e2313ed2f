"""Reads a video of the toy world: what a person would say that it shows, found by arithmetic.

Nothing here was trained. Each property is the one whose rendering is nearest to what is seen; a
reading that no rendering comes near to is -1, so that noise is not read as anything.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import avg_pool2d

from .world import BACKGROUNDS, COLOURS, RADII, STILL, WORDS, coverage, path

# From here on a reading is no reading.
LEAST_CONTRAST = 0.2  # between the shape and its background, in RGB
LEAST_OVERLAP = 0.5  # of the mask with the nearest shape, intersection over union
FURTHEST_TRACK = 0.06  # from the nearest motion, in frame widths
LEAST_AREA = 0.3  # of the shape in any frame, as a share of its area in most
GROWTH_IN_WIDTHS = 0.5  # what e-fold growth counts beside a way across the frame
LOOKED_AT = 5  # frames in which the shape is compared
STRIDE = 4  # of the pixels from which colours are told


class Reading(NamedTuple):
    """What B videos show: int64 [B], indices into world.WORDS or -1, and how sure that is."""

    size: torch.Tensor
    colour: torch.Tensor
    shape: torch.Tensor
    motion: torch.Tensor
    speed: torch.Tensor
    background: torch.Tensor
    start: torch.Tensor  # float32 [B, 2], the centre in the first frame, in frame widths
    overlap: torch.Tensor  # float32 [B], of the mask with the nearest shape
    deviation: torch.Tensor  # float32 [B], of the track from the nearest motion's, frame widths


def read(videos: torch.Tensor) -> Reading:
    """Read videos [B, T, H, W, 3], floats in [0, 1], square, of any number of frames but one."""
    videos = videos.float()
    background, colour, contrast = _colours(videos)
    mask = _mask(videos, background, colour)  # [B, T, H, W]
    centre, radius = _track(mask)
    shape, overlap = _shape(mask, centre, radius)
    motion, speed, size, deviation = _motion(centre, radius)
    area = radius.square()
    always = area.amin(1) > LEAST_AREA * area.median(1).values
    seen = (contrast > LEAST_CONTRAST) & always & (overlap > LEAST_OVERLAP)
    moving = seen & (deviation < FURTHEST_TRACK)
    return Reading(
        size=_only(moving, size),
        colour=_only(seen, _nearest(COLOURS, colour)),
        shape=_only(seen, shape),
        motion=_only(moving, motion),
        speed=_only(moving, speed),
        background=_nearest(BACKGROUNDS, background),
        start=centre[:, 0],
        overlap=overlap,
        deviation=deviation,
    )


def say(reading: Reading, row: int = 0) -> dict[str, str]:
    """One row of a reading in words, "?" where it is unsure; no speed for what stays still."""
    said = {}
    for name, words in WORDS.items():
        value = int(getattr(reading, name)[row])
        said[name] = words[value] if value >= 0 else "?"
    if int(reading.motion[row]) == STILL:
        del said["speed"]
    return said


def _colours(videos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The background's colour and the shape's [B, 3], and how far apart they are [B].

    Most pixels are background; the shape's are those that differ most.
    """
    pixels = videos[:, :, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].flatten(1, 3)  # [B, N, 3]
    background = pixels.median(1).values
    difference = (pixels - background[:, None]).norm(dim=-1)
    few = max(1, pixels.shape[1] // 128)  # less than the smallest shape has
    contrast = difference.topk(few, dim=1).values[:, -1:]
    inside = (difference >= 0.8 * contrast)[..., None]
    colour = (pixels * inside).sum(1) / inside.sum(1)
    return background, colour, contrast[:, 0]


def _mask(videos: torch.Tensor, background: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """How much each pixel has of the shape's colour, in [0, 1], weak traces left out."""
    way = colour - background
    direction = way / way.square().sum(-1, keepdim=True).clamp(min=1e-6)
    share = torch.einsum("bthwc,bc->bthw", videos, direction)
    share = share - (background * direction).sum(-1).view(-1, 1, 1, 1)
    share = avg_pool2d(share, 3, stride=1, padding=1, count_include_pad=False)  # less noise
    return ((share - 0.25) * 2).clamp(0, 1)


def _track(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask's centre [B, T, 2] and radius [B, T] in each frame, in frame widths."""
    pixels = mask.shape[-1]
    grid = (torch.arange(pixels, device=mask.device) + 0.5) / pixels
    mass = mask.sum((2, 3)).clamp(min=1e-6)
    x = (mask.sum(2) * grid).sum(-1) / mass
    y = (mask.sum(3) * grid).sum(-1) / mass
    return torch.stack([x, y], dim=-1), (mass / torch.pi).sqrt() / pixels


def _shape(
    mask: torch.Tensor, centre: torch.Tensor, radius: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shape that overlaps the mask most, and by how much, each [B]."""
    frames = torch.linspace(0, mask.shape[1] - 1, LOOKED_AT, device=mask.device).round().long()
    mask, centre, radius = mask[:, frames], centre[:, frames], radius[:, frames]
    overlaps = []
    for shape in range(len(WORDS["shape"])):
        shapes = torch.full_like(radius, shape, dtype=torch.long)
        ideal = coverage(shapes, centre, radius, mask.shape[-1])
        common, either = torch.minimum(mask, ideal), torch.maximum(mask, ideal)
        overlaps.append((common.sum((2, 3)) / either.sum((2, 3)).clamp(min=1e-6)).mean(1))
    overlap, shape = torch.stack(overlaps, dim=-1).max(-1)
    return shape, overlap


def _motion(centre: torch.Tensor, radius: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Motion, speed and size, and how far the track is from theirs, each [B].

    Tracks are compared without their means, so it does not matter where they are.
    """
    ways = path(centre.shape[1]).to(centre).flatten(0, 1)  # [16, T, 3]
    seen = torch.cat([centre, radius.clamp(min=1e-6).log()[..., None]], dim=-1)  # [B, T, 3]
    weights = seen.new_tensor([1, 1, GROWTH_IN_WIDTHS])
    apart = (seen - seen.mean(1, keepdim=True))[:, None] - (ways - ways.mean(1, keepdim=True))
    deviation, way = (apart * weights).square().sum(-1).mean(-1).sqrt().min(-1)  # of [B, 16]
    size = _nearest([[r] for r in RADII], (seen - ways[way])[..., 2].mean(1, keepdim=True).exp())
    return way // 2, way % 2, size, deviation


def _nearest(table, values: torch.Tensor) -> torch.Tensor:
    """The row of a table [N, C] nearest to each of values [B, C]."""
    return torch.cdist(values, values.new_tensor(table)).argmin(-1)


def _only(sure: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.where(sure, values, -1)
