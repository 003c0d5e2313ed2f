"""A network with its condition bound: the velocity that losses and samplers know."""

import torch

from .batches import Batch
from .samplers import guided
from .trigflow import Velocity


def velocity_of(
    network: torch.nn.Module, batch: Batch, context: torch.Tensor | None = None
) -> Velocity:
    """The network's velocity under the batch's prompts and pictures.

    Args:
        network: called as network(x, timestep, context, image), see WanNetwork.
        batch: the conditions.
        context: [B, N, 4096] in place of the batch's prompts.
    """
    context = batch.context if context is None else context

    def velocity(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return network(x.float(), 1000 * level.float(), context, batch.image)

    return velocity


def guided_velocity(
    network: torch.nn.Module, batch: Batch, unconditional: torch.Tensor, scale: float
) -> Velocity:
    """The same with classifier-free guidance towards the prompts, away from `unconditional`.

    Args:
        unconditional: [N, 4096]; pictures stay as they are.
        scale: of the guidance.
    """
    without = unconditional.expand_as(batch.context)
    return guided(velocity_of(network, batch), velocity_of(network, batch, without), scale)


def mixed(x0: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """(1 - s) x0 + s noise in x0's dtype, of x0 and noise [B, ...] and levels s [B]."""
    s = level.to(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
    return torch.lerp(x0, noise, s)
