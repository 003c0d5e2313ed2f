"""How often the toy's reader is right, on clips as they are rendered and on spoilt ones.

    python tests/benchmarks/toy_reader.py [--clips 256] [--frames 17] [--pixels 256]

On the CPU, or on a GPU where there is one. Needs no ComfyUI.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import pack  # noqa: F401
from turbodiffusion_pack.turbo_core.training.toy.reader import read
from turbodiffusion_pack.turbo_core.training.toy.world import WORDS, draw, render

AT_ONCE = 16


def blurred(videos: torch.Tensor, width: int) -> torch.Tensor:
    frames = F.pad(videos.flatten(0, 1).movedim(-1, 1), (width // 2,) * 4, mode="replicate")
    return F.avg_pool2d(frames, width, 1).movedim(1, -1).view(videos.shape)


def coarse(videos: torch.Tensor, factor: int = 8) -> torch.Tensor:
    frames = F.avg_pool2d(videos.flatten(0, 1).movedim(-1, 1), factor)
    frames = F.interpolate(frames, scale_factor=factor, mode="bilinear")
    return frames.movedim(1, -1).view(videos.shape)


def ghosts(videos: torch.Tensor) -> torch.Tensor:
    return torch.cat([videos[:, :1], (videos[:, 1:] + videos[:, :-1]) / 2], dim=1)


def noisy(videos: torch.Tensor, deviation: float) -> torch.Tensor:
    return videos + deviation * torch.randn_like(videos)


SPOILT = {
    "as rendered": lambda videos: videos,
    "noise of 0.1": lambda videos: noisy(videos, 0.1),
    "blur over 5 pixels": lambda videos: blurred(videos, 5),
    "blur over 9 pixels": lambda videos: blurred(videos, 9),
    "an 8th of the resolution": coarse,
    "each frame half the one before": ghosts,
    "ghosts, blur over 5, noise of 0.05": lambda v: noisy(blurred(ghosts(v), 5), 0.05),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("clips", 256), ("frames", 17), ("pixels", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    sys.stdout.write(f"{'':35}" + "".join(f"{name:>11}" for name in WORDS) + "\n")
    for name, spoil in SPOILT.items():
        shares = right(spoil, args.clips, args.frames, args.pixels)
        sys.stdout.write(f"{name:35}" + "".join(f"{100 * s:10.1f}%" for s in shares) + "\n")


def right(spoil, count: int, frames: int, pixels: int) -> list[float]:
    """Share of the clips that are read right, by property."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for first in range(0, count, AT_ONCE):
        clips = draw(0, first, min(AT_ONCE, count - first)).to(device)
        reading = read(spoil(render(clips, frames, pixels)))
        found.append(torch.stack([getattr(reading, n) == getattr(clips, n) for n in WORDS]))
    return torch.cat(found, dim=1).float().mean(1).tolist()


if __name__ == "__main__":
    main()
