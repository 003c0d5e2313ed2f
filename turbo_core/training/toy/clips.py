"""The toy world as training data: clips through the VAE, prompts as words' signs."""

from collections.abc import Callable, Iterator

import torch

from .. import presets
from .vae import pictures
from .words import CHANNELS, TOKENS, signs
from .world import Clips, draw, prompts, render

SHARD = 2048  # samples in a file, about
UNCONDITIONAL = torch.zeros(TOKENS, CHANNELS)  # what no words are

Encode = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def shards(
    encode: Encode,
    settings: presets.Clips,
    video: tuple[int, int],
    seed: int,
    image: bool,
    device: torch.device,
) -> Iterator[dict[str, torch.Tensor]]:
    """What batches.write_data writes, rendered and encoded shard by shard, in fp16 on the CPU.

    Args:
        encode: pictures [B, 3, T, H, W] in [-1, 1] to latents as the network knows them.
        settings: how many clips.
        video: frames, and pixels of a frame's edge.
        seed: of the world.
        image: with the first frame as the picture of image to video.
        device: that renders.
    """
    starts = range(0, settings.samples, settings.batch)
    per_shard = max(1, SHARD // settings.batch)
    for first in range(0, len(starts), per_shard):
        parts = []
        for at in starts[first : first + per_shard]:
            clips = draw(seed, at, min(settings.batch, settings.samples - at)).to(device)
            parts.append(_encoded(encode, clips, video, image))
        yield {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


def contexts(clips: Clips, image: bool) -> torch.Tensor:
    """What the clips' prompts say, float32 [B, 16, 64] on the CPU.

    Args:
        image: a picture tells where the clips start, so the prompts do not.
    """
    return torch.stack([signs(prompt) for prompt in prompts(clips, told=not image)])


def conditioned(encode: Encode, videos: torch.Tensor) -> torch.Tensor:
    """The first frames as image to video is given them, [B, 20, T', H', W'] on the latents' grid.

    As ComfyUI's WanImageToVideo and its Wan model have it: 4 channels of a mask, 1 where frames are
    given, then 16 of the latents of a clip that has the given frame first and is gray behind it.

    Args:
        videos: [B, 3, T, H, W] in [-1, 1], of which the first frame counts.
    """
    given = torch.zeros_like(videos)
    given[:, :, :1] = videos[:, :, :1]
    latents = encode(given)
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, :1] = 1
    return torch.cat([mask, latents], dim=1)


def _encoded(encode: Encode, clips: Clips, video: tuple[int, int], image: bool) -> dict:
    videos = pictures(render(clips, *video))
    found = {"latents": encode(videos), "contexts": contexts(clips, image)}
    if image:
        found["images"] = conditioned(encode, videos)
    return {name: tensor.half() for name, tensor in found.items()}
