"""How far samples are from what was asked for, from the teacher's, and from each other."""

import functools
from collections.abc import Sequence

import torch

from ..trigflow import Velocity
from ..velocity import mixed
from .reader import Reading
from .world import PLACES, STILL, WORDS, Clips, corner_of_region, places

# Mean distance of two points of the unit square.
UNIFORM_DISTANCE = 0.521405433164720678
GRID = 64  # points an edge that stand for the uniform distribution
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # noise levels of velocity_errors

Measures = dict[str, float]


def shares_right(reading: Reading, clips: Clips, frames: int) -> Measures:
    """Share of the videos that show what the prompt says, by property, and in "all" of them.

    The speed counts where something moves.
    """
    right = {name: getattr(reading, name) == getattr(clips, name) for name in WORDS}
    right["region"] = in_region(reading, clips, frames)
    moves = clips.motion != STILL
    everything = torch.stack([*right.values()]).all(0)
    shares = {name: float(r.float().mean()) for name, r in right.items()}
    return shares | {
        "speed": float(right["speed"][moves].float().mean()),
        "all": float(everything.float().mean()),
    }


def starts(reading: Reading, clips: Clips, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where among its places each video starts, [B, 2], and for which [B] that could be read.

    The n places of a row are at 1/2n, 3/2n, ... so that clips are close to uniform on the square.
    """
    first, count = places(clips, frames)
    sure = (reading.motion == clips.motion) & (reading.shape >= 0)
    return (PLACES * reading.start - first + 0.5) / count, sure


def in_region(reading: Reading, clips: Clips, frames: int) -> torch.Tensor:
    """Whether each video starts in the region of its clip, at a place that touches it, bool [B]."""
    where, sure = starts(reading, clips, frames)
    middle = corner_of_region(clips.start) + 1 / 6
    reach = 1 / 6 + 0.5 / places(clips, frames)[1]  # half a region and half a place
    return sure & ((where - middle).abs() <= reach).all(-1)


def energy_distance(points: torch.Tensor) -> float:
    """Energy distance of points [N, 2] to the uniform distribution over the unit square.

    2 E|X - U| - E|X - X'| - E|U - U'| (Szekely and Rizzo 2013), without bias: about 0 for uniform
    points, and positive for others as far as N lets it be seen.
    """
    along = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    uniform = torch.cartesian_prod(along, along)
    points = points.double().cpu()
    count = len(points)
    between = torch.cdist(points, points).sum() / (count * (count - 1))
    return float(2 * torch.cdist(points, uniform).mean() - between - UNIFORM_DISTANCE)


def spread(points: torch.Tensor, sure: torch.Tensor) -> float:
    """How far apart two videos of one prompt start, 1 for uniform starts, 0 for always the same.

    Args:
        points: [2 P, 2], those of one prompt side by side; its starts lie in a square of edge 1.
        sure: [2 P], which of them were read.
    """
    first, second = points.double().view(-1, 2, 2).unbind(1)
    both = sure.view(-1, 2).all(1)
    return float((first - second)[both].norm(dim=-1).mean() / UNIFORM_DISTANCE)


def sliced_distance(
    a: torch.Tensor, b: torch.Tensor, directions: int = 512, seed: int = 0
) -> float:
    """Sliced 1-Wasserstein distance of samples a and b [N, ...], the mean over random directions.

    Directions have length 1, so for numbers of variance 1 the projections have it too. Two sets of
    N samples from one distribution are not at 0: compare with such a pair.
    """
    a, b = a.flatten(1).float(), b.flatten(1).float()
    total = 0.0
    for ways in _directions(a.shape[1], directions, seed, a.device):
        apart = (a @ ways).sort(dim=0).values - (b @ ways).sort(dim=0).values
        total += float(apart.abs().mean()) * ways.shape[1]
    return total / directions


@functools.lru_cache(maxsize=1)
def _directions(numbers: int, count: int, seed: int, device: torch.device) -> list[torch.Tensor]:
    """Vectors of length 1, up to 64 to a tensor [numbers, 64]; kept, as a CPU draws them slowly."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(64, count - at) for at in range(0, count, 64)]
    drawn = [torch.randn(numbers, size, generator=generator) for size in sizes]
    return [(ways := some.to(device)).div_(ways.norm(dim=0)) for some in drawn]


def velocity_errors(
    student: Velocity,
    teacher: Velocity,
    latents: torch.Tensor,
    noise: torch.Tensor,
    levels: Sequence[float] = LEVELS,
) -> dict[float, float]:
    """|student - teacher| / |teacher| over all numbers, by noise level, on the same inputs."""
    errors = {}
    for level in levels:
        given = torch.full((len(latents),), level, dtype=torch.float64, device=latents.device)
        x = mixed(latents, noise, given)
        found, expected = student(x, given).double(), teacher(x, given).double()
        errors[level] = float((found - expected).norm() / expected.norm())
    return errors


def mean_of(errors: dict[float, float]) -> float:
    """The mean over the noise levels."""
    return sum(errors.values()) / len(errors)
