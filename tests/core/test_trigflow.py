"""The wrapper of angles, the noise levels, the samplers and the average, on cases known in full."""

import math

import torch
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.training.trigflow import (
    angle_of,
    denoise,
    level_of,
    noised,
    predict,
)

LEVELS = torch.linspace(0, 1, 11, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def test_angle_and_level_are_one_signal_to_noise_ratio():
    angle = angle_of(LEVELS)
    torch.testing.assert_close(level_of(angle), LEVELS, rtol=0, atol=1e-15)
    middle = slice(1, -1)
    ratio = LEVELS[middle] / (1 - LEVELS[middle])
    torch.testing.assert_close(angle[middle].tan(), ratio, rtol=1e-12, atol=0)
    assert angle[0] == 0 and angle[-1] == math.pi / 2
    rcm = torch.tensor([math.atan(80), 1.5, 1.4, 1.0, 0.0])
    torch.testing.assert_close(level_of(rcm).float(), rcm_sigmas(4, 80))


def test_a_network_that_knows_the_answer_answers_on_the_circle():
    """v = noise - x0 becomes F = cos t noise - sin t x0, at both ends too."""
    x0, noise = normal(11, 3, 2), normal(11, 3, 2, seed=1)
    angle = angle_of(LEVELS)
    x = noised(x0, noise, angle)
    seen = []

    def velocity(point, level):
        seen.append((point, level))
        return (noise - x0).bfloat16().double()

    x0, noise = x0.bfloat16().double(), noise.bfloat16().double()
    prediction = predict(lambda point, level: noise - x0, noised(x0, noise, angle), angle)
    t = angle.reshape(-1, 1, 1)
    torch.testing.assert_close(prediction, t.cos() * noise - t.sin() * x0, rtol=0, atol=1e-14)
    back = denoise(noised(x0, noise, angle), prediction, angle)
    torch.testing.assert_close(back, x0, rtol=0, atol=1e-14)
    predict(velocity, x, angle)
