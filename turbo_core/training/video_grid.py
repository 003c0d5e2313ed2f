"""Several videos side by side as one animated picture, which every browser plays."""

import math
from pathlib import Path

import torch

from .pillow import Image, features, has_pillow, write_picture

FRAMES_PER_SECOND = 16
GAP = 4  # white pixels between videos
QUALITY = 85


def save_grid(path: Path, videos: torch.Tensor, columns: int | None = None) -> None:
    """Write `path`.webp, or .gif where this Pillow has no animated WebP.

    Args:
        path: without a suffix.
        videos: float in 0 to 1 or uint8 [N, T, H, W, 3].
        columns: videos in a row; the grid is about square without.
    """
    if not has_pillow():
        return
    frames = [
        Image.frombytes("RGB", (frame.shape[1], frame.shape[0]), frame.numpy().tobytes())
        for frame in tiled(_bytes(videos), columns or math.ceil(math.sqrt(len(videos))))
    ]
    webp = features.check("webp")
    options = {"quality": QUALITY, "method": 4} if webp else {}
    write_picture(
        path.with_name(path.name + (".webp" if webp else ".gif")),
        lambda part: frames[0].save(
            part,
            save_all=True,
            append_images=frames[1:],
            duration=round(1000 / FRAMES_PER_SECOND),
            loop=0,
            **options,
        ),
    )


def tiled(videos: torch.Tensor, columns: int) -> torch.Tensor:
    """uint8 [N, T, H, W, 3] as one video [T, H', W', 3], row by row, with gaps of white."""
    count, length, height, width, _ = videos.shape
    rows = math.ceil(count / columns)
    grid = videos.new_full(
        (length, rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255
    )
    for i, video in enumerate(videos):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        grid[:, top : top + height, left : left + width] = video
    return grid


def _bytes(videos: torch.Tensor) -> torch.Tensor:
    videos = videos.detach().cpu()
    if videos.dtype == torch.uint8:
        return videos
    return (videos.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
