"""A world of one shape that moves: its clips, drawn from a seed, in words and in pixels.

Nothing is stored: seed + index is the sample. The numbers of a sample come from a hash, not from
torch's generator, so it is the same clip on every machine, in every version.
"""

import functools
import hashlib
import math
from typing import NamedTuple

import torch

# What a prompt says, in the order in which it says it.
WORDS = {
    "size": ("small", "big"),
    "colour": ("red", "green", "blue", "yellow", "orange", "purple", "cyan"),
    "shape": ("circle", "square", "triangle", "diamond"),
    "motion": (
        "moves left",
        "moves right",
        "moves up",
        "moves down",
        "circles",
        "bounces",
        "grows",
        "stays still",
    ),
    "speed": ("slowly", "fast"),
    "background": ("black", "gray", "white", "navy"),
}
STILL = 7  # the motion that has no speed
# Where a shape starts, as text-to-video prompts tell: the thirds of the room it has, row by row. A
# picture tells it itself.
REGIONS = (
    *("northwest", "north", "northeast"),
    *("west", "centre", "east"),
    *("southwest", "south", "southeast"),
)

COLOURS = (
    (0.90, 0.08, 0.08),
    (0.10, 0.75, 0.15),
    (0.10, 0.35, 1.00),
    (1.00, 0.90, 0.10),
    (1.00, 0.50, 0.00),
    (0.60, 0.10, 0.80),
    (0.10, 0.90, 0.95),
)
BACKGROUNDS = ((0.02, 0.02, 0.02), (0.45, 0.45, 0.45), (0.97, 0.97, 0.97), (0.05, 0.05, 0.28))

# A shape is a star: so many points, and how far out the corners between them are, here in line with
# them. The circle has enough points that no pixel shows them; the square stands on a side. A star
# with thin points was the one shape that the toys did not learn in minutes.
POINTS = (60, 4, 3, 4)
INNER = tuple(math.cos(math.pi / points) for points in POINTS)
TURNED = (0.0, math.pi / 4, 0.0, 0.0)

# Lengths are in frame widths. A shape's radius is that of the disc of the same area.
RADII = (0.09, 0.15)
FURTHEST = 1.56  # radii from its centre to the furthest point of any shape
EDGE = 0.02  # what always stays free at the frame's edge
# Starts lie on a grid, a token of the networks apart. On any pixel, there would be more looks of a
# shape in tokens than a few million weights learn in minutes.
PLACES = 16
# How much of its motion a clip shows, slow and fast.
WAY = (0.125, 0.25)
TURNS, ORBIT = (0.75, 1.25), 0.1
BOUNCES, HEIGHT = (1, 2), 0.15
GROWTH = (1.3, 1.7)


class Clips(NamedTuple):
    """What is seen in B clips. All but the start are int64 [B], indices into WORDS."""

    size: torch.Tensor
    colour: torch.Tensor
    shape: torch.Tensor
    motion: torch.Tensor
    speed: torch.Tensor
    background: torch.Tensor
    start: torch.Tensor  # float32 [B, 2], x and y in [0, 1) of the places there are, see `places`

    def to(self, device: torch.device | str) -> "Clips":
        """The same clips on `device`; the way to a GPU is not waited for."""
        ahead = torch.device(device).type != "cpu"
        return Clips(*(tensor.to(device, non_blocking=ahead) for tensor in self))

    def some(self, which: slice | torch.Tensor) -> "Clips":
        """Some of the clips."""
        return Clips(*(tensor[which] for tensor in self))


def draw(seed: int, first: int, count: int) -> Clips:
    """The clips `first` to `first + count` of the world `seed`, on the CPU.

    Every value of every property is as likely as any other, the start is uniform over the places.
    """
    numbers = [_numbers(seed, index) for index in range(first, first + count)]
    numbers = torch.tensor(numbers, dtype=torch.float64).view(count, 8)
    named = {
        name: (numbers[:, i] * len(values)).long() for i, (name, values) in enumerate(WORDS.items())
    }
    named["speed"][named["motion"] == STILL] = 0
    return Clips(**named, start=numbers[:, 6:].float())


def prompts(clips: Clips, told: bool = True) -> list[str]:
    """What the clips show: "a big red circle in the northwest moves left slowly on black".

    Args:
        told: whether the prompts say where it starts.
    """
    columns = zip(*(getattr(clips, name).tolist() for name in WORDS), strict=True)
    where = [f" in the {REGIONS[i]}" if told else "" for i in _region(clips.start).tolist()]
    said = (dict(zip(WORDS, values, strict=True)) for values in columns)
    return [_prompt(values, region) for values, region in zip(said, where, strict=True)]


def corner_of_region(start: torch.Tensor) -> torch.Tensor:
    """The upper left corner, [..., 2], of the region in which `start` [..., 2] is."""
    return (3 * start).floor().clamp(0, 2) / 3


def start_in(prompt: str) -> tuple[float, float]:
    """The middle of the region that a prompt names, or of all the room."""
    named = [i for i, region in enumerate(REGIONS) if region in prompt.lower().split()]
    row, column = divmod(named[0], 3) if named else (1, 1)
    return (column + 0.5) / 3, (row + 0.5) / 3


def properties(prompt: str) -> dict[str, int]:
    """What a prompt of this world asks for: the index into WORDS of each property it names."""
    said = set(prompt.lower().split())
    keys = {name: [value.split()[-1] for value in values] for name, values in WORDS.items()}
    return {name: k.index(word) for name, k in keys.items() for word in k if word in said}


def path(frames: int) -> torch.Tensor:
    """How each motion goes at each speed, float64 [8 motions, 2 speeds, frames, 3].

    The three are the way from the start, to the right and down, and the logarithm of how much the
    shape has grown.
    """
    time = torch.linspace(0, 1, frames, dtype=torch.float64)
    ways = torch.zeros(len(WORDS["motion"]), 2, frames, 3, dtype=torch.float64)
    for fast in range(2):
        left, right, up, down, circles, bounces, grows, _ = ways[:, fast]
        right[:, 0] = down[:, 1] = WAY[fast] * time
        left[:, 0] = up[:, 1] = -WAY[fast] * time
        angle = 2 * math.pi * TURNS[fast] * time
        circles[:, 0], circles[:, 1] = ORBIT * angle.sin(), ORBIT * (1 - angle.cos())
        bounces[:, 1] = -HEIGHT * (math.pi * BOUNCES[fast] * time).sin().abs()
        grows[:, 2] = math.log(GROWTH[fast]) * time
    return ways


def room(clips: Clips, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the shape's centre may start so that all of it stays in the frame, whatever its shape.

    Returns:
        The upper left and the lower right corner, float32 [B, 2], in frame widths.
    """
    way = _path_on(clips.start.device, frames)[clips.motion, clips.speed]  # [B, T, 3]
    biggest = _of(RADII, clips.size) * way[..., 2].amax(1).exp()
    margin = (FURTHEST * biggest + EDGE)[:, None]
    return margin - way[..., :2].amin(1), 1 - margin - way[..., :2].amax(1)


def places(clips: Clips, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in the room a clip may start: at first / PLACES and the `count` - 1 next ones.

    Returns:
        first and count, float32 [B, 2], of whole numbers.
    """
    low, high = room(clips, frames)
    first = (PLACES * low).ceil()
    return first, (PLACES * high).floor() - first + 1


def track(clips: Clips, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The centre [B, frames, 2] and the radius [B, frames] of each clip's shape, float32."""
    way = _path_on(clips.start.device, frames)[clips.motion, clips.speed]
    first, count = places(clips, frames)
    start = (first + torch.minimum((count * clips.start).floor(), count - 1)) / PLACES
    return start[:, None] + way[..., :2], _of(RADII, clips.size)[:, None] * way[..., 2].exp()


def render(
    clips: Clips,
    frames: int,
    pixels: int,
    corner: torch.Tensor | None = None,
    crop: int | None = None,
) -> torch.Tensor:
    """Videos [B, frames, pixels, pixels, 3], float32 in [0, 1], on the clips' device.

    With `crop` only so many pixels, from the upper left `corner` [B, 2] on, in frame widths.
    """
    centre, radius = track(clips, frames)
    if corner is not None:
        centre = centre - corner[:, None]
    shape = clips.shape[:, None].expand_as(radius)
    inside = coverage(shape, centre, radius, pixels, crop)[..., None]
    background = _of(BACKGROUNDS, clips.background).view(-1, 1, 1, 1, 3)
    return torch.lerp(background, _of(COLOURS, clips.colour).view(-1, 1, 1, 1, 3), inside)


def coverage(
    shape: torch.Tensor,
    centre: torch.Tensor,
    radius: torch.Tensor,
    pixels: int,
    crop: int | None = None,
) -> torch.Tensor:
    """How much of each pixel a shape covers, in [0, 1]: [..., pixels, pixels].

    Args:
        shape: int64 [...].
        centre: float32 [..., 2], in frame widths.
        radius: float32 [...], that of the disc of the same area.
        pixels: in a frame width.
        crop: how many of them there are, from the upper left on, if not all.
    """
    points, inner, turned = (
        _of(table, shape)[..., None, None] for table in (POINTS, INNER, TURNED)
    )
    half = math.pi / points  # the angle between a point and the next corner
    outer = radius[..., None, None] * (math.pi / (points * inner * half.sin())).sqrt()
    grid = (torch.arange(crop or pixels, device=radius.device) + 0.5) / pixels
    x = grid - centre[..., 0, None, None]
    y = grid[:, None] - centre[..., 1, None, None]
    # Fold all points onto one; there the outline is a straight line.
    angle = torch.atan2(x, -y) + turned
    angle = angle - 2 * half * (angle / (2 * half)).round()
    away = torch.hypot(x, y)
    across, along = inner * half.sin(), 1 - inner * half.cos()  # that line's normal
    distance = across * (away * angle.cos() - outer) + along * away * angle.abs().sin()
    return (0.5 - pixels * distance / torch.hypot(across, along)).clamp(0, 1)


def _numbers(seed: int, index: int) -> list[float]:
    """Eight numbers in [0, 1)."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return [int.from_bytes(digest[i : i + 3], "little") / 2**24 for i in range(0, 32, 4)]


def _region(start: torch.Tensor) -> torch.Tensor:
    """Indices into REGIONS, int64 [B]."""
    column, row = (3 * corner_of_region(start)).round().long().unbind(-1)
    return 3 * row + column


def _prompt(values: dict[str, int], region: str) -> str:
    said = {name: WORDS[name][value] for name, value in values.items()}
    speed = "" if values["motion"] == STILL else f" {said['speed']}"
    subject = f"a {said['size']} {said['colour']} {said['shape']}{region}"
    return f"{subject} {said['motion']}{speed} on {said['background']}"


def _of(table: tuple, indices: torch.Tensor) -> torch.Tensor:
    """The rows of a table of numbers, in float32 on the indices' device."""
    return _on(indices.device, table)[indices]


@functools.cache  # here and below: a copy to a GPU waits for all that it still has to do
def _on(device: torch.device, table: tuple) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.float32, device=device)


@functools.cache
def _path_on(device: torch.device, frames: int) -> torch.Tensor:
    return path(frames).to(device, torch.float32)
