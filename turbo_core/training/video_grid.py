"""Several videos side by side as one animated picture, which every browser plays."""

import io
import math
from pathlib import Path

import torch

from .pillow import Image, features, has_pillow, write_picture

FRAMES_PER_SECOND = 16
GAP = 4  # white pixels between videos
QUALITIES = (85, 70, 50, 30)  # of a WebP, the best that is small enough


def save_grid(
    path: Path, videos: torch.Tensor, columns: int | None = None, most: int | None = None
) -> None:
    """Write `path`.webp, or .gif where this Pillow has no animated WebP.

    Args:
        path: without a suffix.
        videos: float in 0 to 1 or uint8 [N, T, H, W, 3].
        columns: videos in a row; the grid is about square without.
        most: bytes that it should have at most, for which a WebP's quality is lowered.
    """
    if not has_pillow():
        return
    frames = [
        Image.frombytes("RGB", (frame.shape[1], frame.shape[0]), frame.numpy().tobytes())
        for frame in tiled(_bytes(videos), columns or math.ceil(math.sqrt(len(videos))))
    ]
    if not features.check("webp"):
        gif = _encoded(frames, "gif")
        write_picture(path.with_name(path.name + ".gif"), lambda part: part.write_bytes(gif))
        return
    for quality in QUALITIES:
        webp = _encoded(frames, "webp", quality=quality, method=4)
        if most is None or len(webp) <= most:
            break
    write_picture(path.with_name(path.name + ".webp"), lambda part: part.write_bytes(webp))


def _encoded(frames: list, kind: str, **options: int) -> bytes:
    made, pause = io.BytesIO(), round(1000 / FRAMES_PER_SECOND)
    animated = {"save_all": True, "append_images": frames[1:], "duration": pause, "loop": 0}
    frames[0].save(made, kind, **animated, **options)
    return made.getvalue()


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
