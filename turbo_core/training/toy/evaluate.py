"""The toy's examination: each way to sample, on the same prompts and noise, as a row of a table."""

import csv
import io
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import avg_pool2d

from ..batches import Batch
from ..pillow import Image, ImageDraw, ImageFont, has_pillow
from .measures import Measures, energy_distance, shares_right, sliced_distance, spread, starts
from .reader import Reading, read
from .vae import psnr
from .world import Clips, prompts

Sample = Callable[[Batch, torch.Tensor], torch.Tensor]  # conditions, noise -> latents
Decode = Callable[[torch.Tensor], torch.Tensor]  # latents -> videos [B, T, H, W, 3] in [0, 1]

SHARES = ("colour", "shape", "size", "motion", "speed", "region", "background", "all")
COLUMNS = {
    "shares": SHARES,
    "numbers": ("spread", "energy", "distance", "latent_mse", "psnr"),
}
CAPTION = 14  # pixels above a video
LETTER = 6  # pixels that one takes


@dataclass
class Row:
    """One way to sample: its name, its measures, and its first videos to look at."""

    name: str
    measures: Measures
    videos: torch.Tensor


class Examination:
    """The prompts, twice each, with the noise; rows are added one after the other.

    Args:
        clips: held out, on the device; two neighbours differ in their start, not in its region.
        batch: their latents and conditions.
        decode: the VAE.
        frames: of a clip.
        at_once: samples in one pass.
        seed: of the noise.
        shown: of how many prompts videos are kept.
    """

    def __init__(
        self,
        clips: Clips,
        batch: Batch,
        decode: Decode,
        frames: int,
        at_once: int,
        seed: int,
        shown: int = 4,
    ):
        self.clips, self.batch, self.decode, self.frames = clips, batch, decode, frames
        self.at_once, self.shown = at_once, shown
        self.noise, self.other_noise = (
            torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(seed + i)).to(
                batch.latents
            )
            for i in range(2)
        )
        self.rows: list[Row] = []
        self.teacher = self.reference = None  # latents of the same noise, and of other noise
        self.teacher_videos: list[torch.Tensor] = []  # of the same noise, fp16
        self.floor = 0.0

    def set_teacher(self, sample: Sample) -> torch.Tensor:
        """Sample the teacher twice: what all others are compared with, and what chance makes."""
        self.teacher = self.sampled(sample)
        self.reference = self.sampled(sample, self.other_noise)
        self.floor = sliced_distance(self.teacher, self.reference)
        self.teacher_videos = [
            self.decode(part).half() for part in self.teacher.split(self.at_once)
        ]
        return self.teacher

    @torch.no_grad()
    def sampled(self, sample: Sample, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Latents of all prompts by `sample`, from the noise that all rows share."""
        noise = self.noise if noise is None else noise
        found = []
        for at in range(0, len(noise), self.at_once):
            rows = slice(at, at + self.at_once)
            found.append(sample(some(self.batch, rows), noise[rows]))
        return torch.cat(found)

    def distance(self, latents: torch.Tensor) -> float:
        """Sliced distance to the teacher's samples of other noise, above that of the teacher."""
        return sliced_distance(latents, self.reference) - self.floor

    @torch.no_grad()
    def add(self, name: str, latents: torch.Tensor) -> Row:
        """Decode, read and measure."""
        readings, ratios, kept = [], [], []
        for part, teachers in zip(latents.split(self.at_once), self.teacher_videos, strict=True):
            videos = self.decode(part)
            readings.append(read(videos))
            ratios.append(psnr(videos.half(), teachers))
            if len(kept) * self.at_once < 2 * self.shown:
                kept.append(videos.cpu())
        reading = Reading(*(torch.cat(parts) for parts in zip(*readings, strict=True)))
        where, sure = starts(reading, self.clips, self.frames)
        error = (latents - self.teacher).double().square().mean()
        measures = shares_right(reading, self.clips, self.frames) | {
            "spread": spread(3 * where, sure),  # a region is a third
            "energy": energy_distance(where[sure]),
            "distance": self.distance(latents),
            "latent_mse": float(error),
            "psnr": float(torch.cat(ratios).mean()),
        }
        self.rows.append(Row(name, measures, torch.cat(kept)[: 2 * self.shown : 2]))
        return self.rows[-1]

    def prompts(self) -> list[str]:
        """Those whose videos are kept."""
        return prompts(self.clips.some(slice(0, 2 * self.shown, 2)))


def pictures(rows: list[Row], prompts: list[str]) -> torch.Tensor:
    """Their videos with captions, uint8 [N, T, H, W, 3]: a row of them a prompt, which stands at
    its head, and a column each way to sample.

    They are half as large as they were, so that many fit side by side.
    """
    columns = [captioned(half(row.videos), row.name) for row in rows]
    length, height, width = columns[0].shape[1:4]
    lines = [textwrap.fill(prompt, width // LETTER) for prompt in prompts]
    heads = torch.stack([lettered(text, height, width, top=CAPTION) for text in lines])
    columns.insert(0, heads[:, None].expand(-1, length, -1, -1, -1))
    return torch.stack(columns, dim=1).flatten(0, 1)


def half(videos: torch.Tensor) -> torch.Tensor:
    """Videos [N, T, H, W, 3] at half their height and width."""
    frames = avg_pool2d(videos.flatten(0, 1).movedim(-1, 1), 2).movedim(1, -1)
    return frames.unflatten(0, videos.shape[:2])


def captioned(videos: torch.Tensor, text: str) -> torch.Tensor:
    """Videos [N, T, H, W, 3] in [0, 1] as uint8, a line of text above."""
    seen = (videos.clamp(0, 1) * 255).round().to(torch.uint8)
    line = lettered(text, CAPTION, videos.shape[3])
    return torch.cat([line.expand(*videos.shape[:2], -1, -1, -1), seen], dim=2)


def lettered(text: str, height: int, width: int, top: int = 1) -> torch.Tensor:
    """Black on white, uint8 [H, W, 3]; white alone without Pillow."""
    if not has_pillow():
        return torch.full((height, width, 3), 255, dtype=torch.uint8)
    picture = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(picture).text((2, top), text, fill="black", font=ImageFont.load_default())
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3)


def some(batch: Batch, rows: slice) -> Batch:
    """A part of a batch."""
    image = None if batch.image is None else batch.image[rows]
    return Batch(batch.latents[rows], batch.context[rows], image)


def markdown(rows: list[Row]) -> str:
    """The rows as a table: shares in percent, the rest as numbers."""
    names = (*SHARES, *COLUMNS["numbers"])
    lines = [f"| | {' | '.join(names)} |", "|---|" + "--:|" * len(names)]
    for row in rows:
        shares = [f"{100 * row.measures[name]:.1f}" for name in SHARES]
        numbers = [f"{row.measures[name]:.4g}" for name in COLUMNS["numbers"]]
        lines.append(f"| {row.name} | {' | '.join(shares + numbers)} |")
    return "\n".join(lines) + "\n"


def as_csv(rows: list[Row]) -> str:
    """The rows with all digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = (*SHARES, *COLUMNS["numbers"])
    writer.writerow(["name", *names])
    writer.writerows([row.name, *(row.measures[name] for name in names)] for row in rows)
    return text.getvalue()
