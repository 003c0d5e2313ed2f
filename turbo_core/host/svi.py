"""The conditioning of SVI 2.0 Pro: a clip that goes on from the one before it.

Stable Video Infinity (arXiv 2510.09212) trains LoRAs on Wan's image-to-video experts for videos of
many clips. Its 2.0 Pro conditions a clip on latents, so that none is decoded and encoded again:

    latent frame   0        1 .. m                            m + 1 ..
    first clip     anchor   zero                              zero
    a later clip   anchor   the last m of the clip before     zero

The anchor is the picture of the whole video, and alone marked as known. The first 1 + m latent
frames of a later clip, 1 + 4 m pictures, are the end of the clip before once more.
"""

import reprlib

import comfy.latent_formats
import comfy.model_management
import torch

CONDITIONING = list[list]  # [text features, options] of each prompt in it
# What Wan's image-to-video models are conditioned on: latents, and 0 where those are the video.
LATENTS, KNOWN = "concat_latent_image", "concat_mask"
CHANNELS = 16  # of a latent of Wan 2.1's VAE
FRAMES = 4  # of a video in a latent frame, but for the first


def condition_clip(
    positive: CONDITIONING,
    negative: CONDITIONING,
    anchor: dict,
    previous: dict | None,
    length: int,
    motion_latents: int,
) -> tuple[CONDITIONING, CONDITIONING, dict]:
    """Both CONDITIONINGs for a clip of `length` frames, and the empty LATENT to sample.

    Args:
        anchor: LATENT [B, 16, F, H, W] of the video's picture; its first frame counts.
        previous: LATENT of the clip or the video so far, None for the first clip.
        motion_latents: how many of its last latent frames are looked at.

    Raises:
        ValueError: no CONDITIONING; a latent of something else, of another size or too short; a
            length that leaves nothing to make.
    """
    anchor = _video("anchor_samples", anchor)[:, :, :1]
    given = [anchor] if previous is None else [anchor, _motion(anchor, previous, motion_latents)]
    latents = _padded(torch.cat(given, dim=2), length)
    mask = torch.ones_like(latents[:1, :1])
    mask[:, :, 0] = 0
    values = {LATENTS: latents, KNOWN: mask}
    empty = torch.zeros(latents.shape, device=comfy.model_management.intermediate_device())
    both = _with("positive", positive, values), _with("negative", negative, values)
    return *both, {"samples": empty}


def _with(name: str, conditioning: CONDITIONING, values: dict) -> CONDITIONING:
    """A copy of `conditioning` with these options. A client may write anything in its place."""
    if not isinstance(conditioning, list):
        raise ValueError(
            f"{name} must be a CONDITIONING, got the {type(conditioning).__name__} "
            f"{reprlib.repr(conditioning)}. Link it to a node that encodes a prompt."
        )
    return [[features, {**options, **values}] for features, options in conditioning]


def _padded(known: torch.Tensor, length: int) -> torch.Tensor:
    """`known` [B, 16, F, H, W] and behind it what the model takes for zero, up to `length` frames.

    WanImageToVideo has encoded grey pictures there, which SVI was not trained with.
    """
    batch, channels, frames, height, width = known.shape
    left = (length - 1) // FRAMES + 1 - frames
    if left < 1:
        raise ValueError(
            f"length is {length} frames, of which the anchor and {frames - 1} motion latents leave "
            f"none to make: use {FRAMES * frames + 1} or more"
        )
    zero = known.new_zeros(batch, channels, left, height, width)
    return torch.cat([known, comfy.latent_formats.Wan21().process_out(zero)], dim=2)


def _motion(anchor: torch.Tensor, previous: dict, count: int) -> torch.Tensor:
    """The last `count` latent frames of `previous`, [B, 16, count, H, W], where the anchor is."""
    previous = _video("prev_samples", previous)
    if previous[:, :, 0].shape != anchor[:, :, 0].shape:
        raise ValueError(
            f"prev_samples are {_size(previous)} and anchor_samples {_size(anchor)}: make both in "
            "one size"
        )
    if previous.shape[2] < count:
        raise ValueError(
            f"prev_samples have {previous.shape[2]} latent frames, fewer than the {count} of "
            "motion_latents: lower it, or connect the whole clip"
        )
    return previous[:, :, -count:].to(anchor)


def _video(name: str, latent: dict) -> torch.Tensor:
    """The samples of a Wan video's LATENT, [B, 16, F, H, W]."""
    samples = latent.get("samples") if isinstance(latent, dict) else latent
    shape = tuple(getattr(samples, "shape", ()))
    if len(shape) != 5 or shape[1] != CHANNELS:
        raise ValueError(
            f"{name} must be a latent of Wan 2.1's VAE, [batch, {CHANNELS}, frames, height, "
            f"width], got {list(shape) or reprlib.repr(samples)}: encode the picture by VAE Encode "
            "with wan_2.1_vae"
        )
    return samples


def _size(latents: torch.Tensor) -> str:
    """Of a frame in pixels, and how many videos."""
    return f"{8 * latents.shape[4]}x{8 * latents.shape[3]} (batch {latents.shape[0]})"
