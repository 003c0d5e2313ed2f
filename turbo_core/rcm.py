"""rCM sampling schedule and update (TurboDiffusion, arXiv 2512.16093; rCM, arXiv 2510.08431)."""

import math

import torch

# Angles t = atan(sigma) after the first step, as the models were distilled.
LATER_ANGLES = (1.5, 1.4, 1.0)
SMALLEST_SIGMA_MAX = math.tan(LATER_ANGLES[0])

# The original's sigma_max. Image to video feeds the image in 20 input channels more than text.
TEXT_TO_VIDEO, IMAGE_TO_VIDEO = 80.0, 200.0
IMAGE_CHANNELS = 36
MOST_STEPS = 10_000  # as ComfyUI's KSampler


def default_sigma_max(in_channels: int) -> float:
    """Where the original starts a model of so many input channels: 200 for 36 of them, else 80."""
    return IMAGE_TO_VIDEO if is_image_to_video(in_channels) else TEXT_TO_VIDEO


def is_image_to_video(in_channels: int) -> bool:
    """Whether a model of so many input channels sees a picture beside the noise."""
    return in_channels == IMAGE_CHANNELS


def rcm_angles(steps: int, sigma_max: float) -> list[float]:
    """Trigonometric-flow angles of an rCM run, `steps` + 1 of them, the last one 0.

    One to four steps take the paper's list from its start. More steps interpolate the whole list
    [atan(sigma_max), 1.5, 1.4, 1.0, 0] linearly at steps + 1 even points.

    Raises:
        ValueError: fewer than one step or more than MOST_STEPS, or a sigma_max that would not
            start the list highest.
    """
    if steps < 1:
        raise ValueError(f"rCM needs at least one step, got {steps}")
    if steps > MOST_STEPS:
        raise ValueError(
            f"rCM takes at most {MOST_STEPS} steps, got {steps}; TurboDiffusion uses 1 to 4"
        )
    if not SMALLEST_SIGMA_MAX < sigma_max < math.inf:
        raise ValueError(
            f"sigma_max must be above {SMALLEST_SIGMA_MAX:.1f} (angle 1.5, the second step), "
            f"got {sigma_max}; TurboDiffusion uses 80 for text, 200 for image to video"
        )
    knots = [math.atan(sigma_max), *LATER_ANGLES]
    if steps <= len(knots):
        return [*knots[:steps], 0.0]
    return [_interpolate([*knots, 0.0], i / steps) for i in range(steps + 1)]


def rcm_sigmas(steps: int, sigma_max: float) -> torch.Tensor:
    """Rectified-flow sigmas s = sin t / (sin t + cos t) of an rCM run, float32 [steps + 1]."""
    angles = torch.tensor(rcm_angles(steps, sigma_max), dtype=torch.float64)
    return (angles.sin() / (angles.sin() + angles.cos())).float()


def sde_step(denoised, noise, sigma_next):
    """x <- (1 - s') x0 + s' noise: back to noise level s' with fresh noise; any shape."""
    return (1 - sigma_next) * denoised + sigma_next * noise


def ode_step(x, denoised, sigma, sigma_next):
    """x <- x - (s - s') v with the velocity v = (x - x0) / s; any shape."""
    return x - (sigma - sigma_next) * (x - denoised) / sigma


def _interpolate(knots: list[float], position: float) -> float:
    """Value of the polyline through `knots` at `position` in [0, 1]."""
    place = position * (len(knots) - 1)
    left = min(int(place), len(knots) - 2)
    return knots[left] + (place - left) * (knots[left + 1] - knots[left])
