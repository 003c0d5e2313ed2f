"""A small data folder of smooth random latents, each with a prompt that tells which it is."""

from pathlib import Path

import torch
from turbodiffusion_pack.turbo_core.training.batches import write_data

SAMPLES = 32


def write(folder: Path, latent: tuple[int, int, int], image: bool = False) -> None:
    """16-channel latents of N(0, 1), alike within a frame, and contexts of 4 tokens of 64."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(SAMPLES, 16, latent[0], 2, 2, generator=generator)
    latents = torch.nn.functional.interpolate(coarse, size=latent, mode="trilinear")
    latents /= latents.std()
    contexts = torch.randn(SAMPLES, 4, 64, generator=generator).sign()
    shard = {"latents": latents.bfloat16(), "contexts": contexts}
    if image:
        mask = torch.zeros(SAMPLES, 4, *latent)
        mask[:, :, 0] = 1
        first = torch.where(torch.arange(latent[0]).reshape(-1, 1, 1) == 0, latents, 0)
        shard["images"] = torch.cat([mask, first], 1).bfloat16()
    halves = [{n: t[i::2] for n, t in shard.items()} for i in range(2)]
    write_data(folder, halves, torch.zeros(4, 64))
