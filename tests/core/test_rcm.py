"""The rCM schedule and updates against the original's runs and the paper's formulas."""

import math

import goldens
import pytest
import torch
from turbodiffusion_pack.turbo_core.rcm import (
    default_sigma_max,
    ode_step,
    rcm_angles,
    rcm_sigmas,
    sde_step,
)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("sigma_max", [80, 200, 1600])
def test_sigmas_equal_the_original(steps, sigma_max):
    recorded = goldens.load("rcm")[f"t2v.steps{steps}.smax{sigma_max}.sde.sigmas"]
    torch.testing.assert_close(rcm_sigmas(steps, sigma_max), recorded, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [5, 8, 12, 50])
def test_more_steps_interpolate_the_angles(steps):
    knots = [math.atan(80), 1.5, 1.4, 1.0, 0.0]
    expected = [_polyline(knots, 4 * i / steps) for i in range(steps + 1)]
    assert rcm_angles(steps, 80) == pytest.approx(expected, abs=1e-12)
    sigmas = rcm_sigmas(steps, 80)
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_eight_steps_pass_through_the_four_step_knots():
    assert rcm_angles(8, 80)[::2] == pytest.approx(rcm_angles(4, 80), abs=1e-12)


@pytest.mark.parametrize(("in_channels", "sigma_max"), [(16, 80), (32, 80), (36, 200), (48, 80)])
def test_only_image_to_video_starts_higher(in_channels, sigma_max):
    assert default_sigma_max(in_channels) == sigma_max


def test_updates_follow_the_paper():
    x, x0, noise = torch.randn(3, 2, 5, dtype=torch.float64)
    s, s_next = 0.93, 0.85
    v = (x - x0) / s
    torch.testing.assert_close(
        sde_step(x0, noise, s_next), (1 - s_next) * (x - s * v) + s_next * noise
    )
    torch.testing.assert_close(ode_step(x, x0, s, s_next), x - (s - s_next) * v)


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps(steps):
    with pytest.raises(ValueError, match="at least one step, got"):
        rcm_sigmas(steps, 80)


@pytest.mark.parametrize("sigma_max", [0, 14.0, math.inf, math.nan])
def test_sigma_max_must_start_the_schedule(sigma_max):
    with pytest.raises(ValueError, match=r"sigma_max must be above 14\.1"):
        rcm_sigmas(4, sigma_max)


def _polyline(knots, place):
    left = min(math.floor(place), len(knots) - 2)
    return knots[left] * (left + 1 - place) + knots[left + 1] * (place - left)
