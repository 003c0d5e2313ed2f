"""Samples from a velocity: a teacher's with guidance and many steps, a student's in a few."""

import itertools

import torch

from .noise_levels import shifted
from .trigflow import Velocity, denoise, noised, predict


def guided(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance (arXiv 2207.12598): u + scale (c - u). Scale 1 costs one pass."""

    def velocity(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        with_text = conditional(x, level)
        if scale == 1:
            return with_text
        without = unconditional(x, level)
        return without + scale * (with_text - without)

    return velocity


def shifted_levels(steps: int, shift: float, sigma_max: float) -> torch.Tensor:
    """Falling noise levels, float64 [steps + 1]: sigma_max / (1 + sigma_max) first, 0 last.

    They lie evenly before the shift, as Wan's own samplers have them.
    """
    first = torch.tensor(sigma_max / (1 + sigma_max), dtype=torch.float64)
    evenly = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shifted(evenly * shifted(first, 1 / shift), shift)


def euler(velocity: Velocity, noise: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """x0 [B, ...] by Euler steps x <- x - (s - s') v along `levels` [steps + 1], state in float64.

    It starts from levels[0] times `noise` [B, ...]; the result has the noise's dtype.
    """
    levels = levels.to(noise.device, torch.float64)
    x = levels[0] * noise.double()
    for level, lower in itertools.pairwise(levels):
        x = x - (level - lower) * velocity(x, level.expand(len(x)))
    return x.to(noise.dtype)


def few_steps(
    velocity: Velocity, noise: torch.Tensor, angles: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """x0 [B, ...] by rCM's stochastic steps: denoise, noise again at the next angle, denoise.

    Gradients flow through the last step alone, as in the rollouts that rCM's score regulariser is
    evaluated on (arXiv 2510.08431, section 3), see last_point.

    Args:
        velocity: the student.
        noise: [B, ...], where the first step starts, times sin of the first angle.
        angles: falling, [steps], or [steps, B] with angles of each sample's own.
        generator: draws the noise between the steps, on the noise's device.

    Returns:
        x0 in the noise's dtype; computed in float64.
    """
    x, angle = last_point(velocity, noise, angles, generator)
    return denoise(x, predict(velocity, x, angle), angle).to(noise.dtype)


@torch.no_grad()
def last_point(
    velocity: Velocity, noise: torch.Tensor, angles: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where few_steps takes its last step: the point [B, ...] and its angle [B], both float64."""
    angles = angles.to(noise.device, torch.float64)
    if angles.ndim == 1:
        angles = angles[:, None].expand(-1, len(noise))
    x0, device, dtype = torch.zeros_like(noise), noise.device, noise.dtype
    for step, angle in enumerate(angles):
        fresh = torch.randn(noise.shape, generator=generator, device=device, dtype=dtype)
        x = noised(x0, fresh if step else noise, angle)
        if step < len(angles) - 1:
            x0 = denoise(x, predict(velocity, x, angle), angle)
    return x, angles[-1]


def falling(angles: torch.Tensor) -> torch.Tensor:
    """Angles [steps, B] made fall from step to step: each at most the one before it."""
    return angles.cummin(dim=0).values
