"""A video decoded by several GPUs: each has some of its strips, and rank 0 gets all frames.

Every rank runs the middle of the network on whole frames, a tenth of the time; then they decode as
many strips at once as there are ranks, in step, each piece on its way while the next is made.
"""

from collections.abc import Iterator

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ..parallel import exchange
from ..parallel.exchange import Ranks
from ..vae_strips import LATENT, Strip, strips_of
from .causal_vae import decode_features, decode_pieces

_vaes = {}  # in a worker, key -> its VAE; the last one only

Piece = tuple[Strip, int, Tensor]


def pieces_of(model, latents: Tensor, strips: list[Strip]) -> Iterator[Piece]:
    """Latents [1, Z, T, H, W] as (strip, t, frames): strip by strip the frames of latents' frame t,
    [1, 1 or 4, H, W, 3]."""
    features = decode_features(model, latents)
    for strip in strips:
        pieces = decode_pieces(model, features, strip if len(strips) > 1 else None)
        yield from ((strip, t, piece) for t, piece in enumerate(pieces))


def strips_for_all(count: int, ranks: int, size: int) -> int:
    """`count` strips or some more, as many for each rank; less where `size` latents are not as
    many. At least `ranks` there have to be."""
    return ranks * min(-(-count // ranks), size // ranks)


def shared_pieces(ranks: Ranks, model, latents: Tensor, strips: list[Strip]) -> Iterator[Piece]:
    """The same in another order, for rank 0; other ranks give it theirs and get nothing.

    There are as many strips for each rank. Where the user cancels it ends early on all ranks.
    """
    features = decode_features(model, latents)
    for first in range(0, len(strips), ranks.count):
        at_once = strips[first : first + ranks.count]
        for t, mine in enumerate(decode_pieces(model, features, at_once[ranks.rank])):
            cancelled = ranks.rank == 0 and comfy.model_management.processing_interrupted()
            if exchange.told(ranks, cancelled):
                return
            pieces = exchange.collect(ranks, mine, [_shape(mine, strip) for strip in at_once])
            yield from ((strip, t, x) for strip, x in zip(at_once, pieces, strict=False))


def _shape(piece: Tensor, strip: Strip) -> tuple[int, ...]:
    """What `piece` would be of another strip."""
    shape = list(piece.shape)
    shape[strip.axis] = LATENT * (strip.last - strip.first)
    return tuple(shape)


@torch.inference_mode()
def decode(
    ranks: Ranks, key: int, weights: dict[str, Tensor] | None, samples: Tensor, dtype, count: int
) -> None:
    """A worker's part of decoding `samples` [B, Z, T, H, W] in `count` strips.

    `weights` are those of the VAE `key`, None where this worker has had them before.
    """
    from .turbo_vae import accelerate_vae

    if weights is not None:
        _vaes.clear()
        _vaes[key] = accelerate_vae(comfy.sd.VAE(sd=weights, dtype=dtype))
    vae = _vaes[key]
    vae.make_room(samples.shape, count)
    model = vae.first_stage_model.model
    strips = strips_of(*samples.shape[3:], count)
    for latents in samples.split(1):
        for _ in shared_pieces(ranks, model, latents.to(vae.device, dtype), strips):
            pass
