"""Sizes and lengths of videos that Wan's latents can hold, and the ones TurboDiffusion uses."""

import math

# The VAE shrinks both sides by 8, and a patch of the transformer takes 2x2 of its pixels.
MULTIPLE = 16

# The sizes (width, height) of TurboDiffusion, whose models come for 480p and for 720p.
SIZES = {
    "480p": {
        "16:9": (832, 480),
        "9:16": (480, 832),
        "4:3": (640, 480),
        "3:4": (480, 640),
        "1:1": (640, 640),
    },
    "720p": {
        "16:9": (1280, 720),
        "9:16": (720, 1280),
        "4:3": (960, 720),
        "3:4": (720, 960),
        "1:1": (960, 960),
    },
}
RESOLUTIONS = (*SIZES, "custom")
IMAGE = "image"
ASPECT_RATIOS = (IMAGE, *SIZES["480p"])

# Longer than this there are too few pixels across for a video, and nearest multiples distort.
LONGEST = 8
MEGAPIXEL = 1024 * 1024  # as ComfyUI counts them
# Beyond what any model makes: a slip, which would ask for memory without end.
LARGEST = 64 * MEGAPIXEL
MOST_FRAMES = 100_000


def video_size(
    resolution: str, aspect_ratio: str, megapixels: float, image: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Width and height of a video.

    Args:
        resolution: "480p" or "720p", or "custom" for an area of `megapixels`.
        aspect_ratio: "image", or one of TurboDiffusion's, which have fixed sizes at 480p and 720p.
        megapixels: area in units of 1024 * 1024 pixels; only "custom" looks at it.
        image: width and height to take the aspect ratio of; only "image" looks at it.

    Raises:
        ValueError: an unknown choice, no image or one that is too long, no area.
    """
    _require_known("resolution", resolution, RESOLUTIONS)
    _require_known("aspect_ratio", aspect_ratio, ASPECT_RATIOS)
    if aspect_ratio == IMAGE and image is None:
        raise ValueError(
            "aspect_ratio is 'image', but no image is connected. Connect one, or choose a fixed "
            "aspect ratio such as 16:9."
        )
    if aspect_ratio != IMAGE and resolution in SIZES:
        return SIZES[resolution][aspect_ratio]
    if aspect_ratio != IMAGE:
        image = tuple(int(side) for side in aspect_ratio.split(":"))
    return adaptive_size(*image, _area(resolution, megapixels))


def adaptive_size(width: int, height: int, area: float) -> tuple[int, int]:
    """The size of about `area` pixels with the aspect ratio of width x height.

    Each side is the nearest multiple of 16 to its exact length, TurboDiffusion's adaptive
    resolution (arXiv 2512.16093, published code).

    Raises:
        ValueError: an image without pixels or longer than 8:1, or an area too small for that or
            far too large.
    """
    if width < 1 or height < 1:
        raise ValueError(f"the image has no pixels: it is {width}x{height}. Connect another one.")
    if max(width, height) > LONGEST * min(width, height):
        raise ValueError(
            f"the image is longer than {LONGEST}:1, it is {width}x{height}. Crop or pad it first, "
            "or choose a fixed aspect ratio."
        )
    if not MULTIPLE**2 * LONGEST <= area <= LARGEST:
        raise ValueError(
            f"a video needs at least {MULTIPLE**2 * LONGEST} pixels, got {area:.0f}. "
            f"Raise megapixels, to {LARGEST // MEGAPIXEL} at most."
        )
    exact = math.sqrt(area * width / height), math.sqrt(area * height / width)
    width, height = (MULTIPLE * round(side / MULTIPLE) for side in exact)
    return width, height


def video_length(seconds: float, fps: float) -> int:
    """Frames of a video of about `seconds`: the nearest 4 n + 1, the longer one of two as near.

    Wan's VAE keeps the first frame and packs the others in fours.

    Raises:
        ValueError: a negative time, no frames in a second, or more than MOST_FRAMES.
    """
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be 0 or more, got {seconds}")
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be above 0, got {fps}")
    if seconds * fps > MOST_FRAMES:
        raise ValueError(
            f"a video has at most {MOST_FRAMES} frames, got {seconds:g} seconds at {fps:g} fps. "
            "Make it shorter."
        )
    return 4 * max(0, math.floor((seconds * fps - 1) / 4 + 0.5)) + 1


def _area(resolution: str, megapixels: float) -> float:
    """Pixels of a frame: TurboDiffusion's 16:9 where the resolution has a name."""
    if resolution in SIZES:
        return math.prod(SIZES[resolution]["16:9"])
    return megapixels * MEGAPIXEL


def _require_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
