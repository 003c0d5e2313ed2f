"""A rectified-flow network seen along the circle of angles that rCM is written in.

A point at angle t in [0, pi/2] is x = cos t x0 + sin t noise, and the network's answer there is
F = cos t noise - sin t x0 (TrigFlow: sCM, arXiv 2410.11081, section 3; its wrapper around a network
of another schedule: rCM, arXiv 2510.08431, section 3). Wan knows the line x = (1 - s) x0 + s noise
instead, with the velocity v = noise - x0; both meet at tan t = s / (1 - s), and there is nothing to
learn in between. All of it is computed in float64, so a network gets float64 and may return what it
likes.
"""

import math
from collections.abc import Callable

import torch

# The velocity [B, ...] of a point x [B, ...] at noise levels s [B], both float64.
Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LARGEST_ANGLE = math.pi / 2


def angle_of(level: torch.Tensor) -> torch.Tensor:
    """The angle t at which the signal is to the noise as at rectified-flow level s in [0, 1]."""
    level = level.double()
    return torch.atan2(level, 1 - level)


def level_of(angle: torch.Tensor) -> torch.Tensor:
    """The rectified-flow level s = sin t / (sin t + cos t) of an angle; inverse of angle_of."""
    sin, cos = angle.double().sin(), angle.double().cos()
    return sin / (sin + cos)


def noised(x0: torch.Tensor, noise: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """x = cos t x0 + sin t noise, float64 [B, ...], from x0 and noise [B, ...] and angles [B]."""
    t = over_axes(angle, x0)
    return t.cos() * x0 + t.sin() * noise


def predict(velocity: Velocity, x: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """F of a rectified-flow network, float64 [B, ...].

    F = ((cos t - sin t) x + v(x / C, sin t / C)) / C with C = cos t + sin t: sCM's
    (cos t x - x0) / sin t without its division, which fails at t = 0.

    Args:
        velocity: the network.
        x: [B, ...], the point at `angle`.
        angle: [B], in [0, pi/2].
    """
    t = over_axes(angle, x)
    both = t.cos() + t.sin()
    v = velocity(x / both, level_of(angle))
    return ((t.cos() - t.sin()) * x + v) / both


def denoise(x: torch.Tensor, prediction: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """x0 = cos t x - sin t F, float64 [B, ...], from x and F [B, ...] and angles [B]."""
    t = over_axes(angle, x)
    return t.cos() * x - t.sin() * prediction


def over_axes(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One float64 value per sample, [B], as [B, 1, ...] beside `like` [B, ...]."""
    return values.double().reshape(-1, *[1] * (like.ndim - 1))
