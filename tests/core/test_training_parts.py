"""Angles, noise levels, samplers and the average of training, on cases known in full."""

import math

import pytest
import torch
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.training.ema import PowerEMA, decay, power_of
from turbodiffusion_pack.turbo_core.training.noise_levels import log_normal, shifted_uniform
from turbodiffusion_pack.turbo_core.training.samplers import (
    euler,
    falling,
    few_steps,
    guided,
    shifted_levels,
)
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
    inside = LEVELS[1:-1]
    torch.testing.assert_close(angle[1:-1].tan(), inside / (1 - inside), rtol=1e-12, atol=0)
    assert angle[0] == 0 and angle[-1] == math.pi / 2
    rcm = torch.tensor([math.atan(80), 1.5, 1.4, 1.0, 0.0])
    torch.testing.assert_close(level_of(rcm).float(), rcm_sigmas(4, 80))


def test_a_network_that_knows_the_answer_gives_it_on_the_circle():
    """v = noise - x0 becomes F = cos t noise - sin t x0, at both ends too."""
    x0, noise = normal(11, 3, 2), normal(11, 3, 2, seed=1)
    angle = angle_of(LEVELS)
    x = noised(x0, noise, angle)
    prediction = predict(lambda point, level: noise - x0, x, angle)
    t = angle.reshape(-1, 1, 1)
    torch.testing.assert_close(prediction, t.cos() * noise - t.sin() * x0, rtol=0, atol=1e-14)
    torch.testing.assert_close(denoise(x, prediction, angle), x0, rtol=0, atol=1e-14)


def test_a_network_is_asked_on_the_line():
    """At (1 - s) x0 + s noise and level s, in float64, whatever it then returns."""
    x0, noise = normal(11, 3, 2), normal(11, 3, 2, seed=1)
    s = LEVELS.reshape(-1, 1, 1)

    def velocity(point, level):
        torch.testing.assert_close(point, (1 - s) * x0 + s * noise, rtol=0, atol=1e-14)
        torch.testing.assert_close(level, LEVELS, rtol=0, atol=1e-15)
        return torch.zeros(11, 3, 2, dtype=torch.bfloat16)

    angle = angle_of(LEVELS)
    assert predict(velocity, noised(x0, noise, angle), angle).dtype == torch.float64


def test_log_normal_levels():
    level = log_normal(20_000, 1.5, 1.6, generator())
    log_sigma = (level / (1 - level)).log()
    assert level.dtype == torch.float64
    assert log_sigma.mean().item() == pytest.approx(1.5, abs=0.04)
    assert log_sigma.std().item() == pytest.approx(1.6, abs=0.04)


def test_shifted_uniform_levels():
    level = shifted_uniform(20_000, 5.0, generator())
    uniform = level / (5 - 4 * level)  # the shift undone
    assert uniform.min() >= 0 and uniform.max() <= 1
    assert uniform.mean().item() == pytest.approx(1 / 2, abs=0.01)
    assert uniform.std().item() == pytest.approx(12**-0.5, abs=0.01)


def test_levels_of_a_sampler():
    levels = shifted_levels(50, 3.0, 80.0)
    assert len(levels) == 51 and levels[-1] == 0
    assert levels[0].item() == pytest.approx(80 / 81, abs=1e-12)
    unshifted = levels / (3 - 2 * levels)
    torch.testing.assert_close(unshifted.diff(), unshifted.diff()[:1].expand(50))


def test_guidance_goes_beyond_the_condition():
    velocity = guided(lambda x, s: x + 1, lambda x, s: x, 5.0)
    assert torch.equal(velocity(torch.zeros(2), torch.zeros(2)), torch.full((2,), 5.0))
    velocity = guided(lambda x, s: x + 1, None, 1.0)  # one pass
    assert torch.equal(velocity(torch.zeros(2), torch.zeros(2)), torch.ones(2))


def test_euler_follows_a_straight_flow_in_one_step():
    """All data at one point: the velocity (x - x0) / s is constant along each path."""
    x0, noise = normal(4, 2), normal(4, 2, seed=1).float()
    for steps in (1, 7):
        found = euler(lambda x, s: (x - x0) / s[:, None], noise, shifted_levels(steps, 3.0, 80.0))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, x0.float())


@pytest.mark.parametrize("own", [False, True], ids=["one list", "of each sample's own"])
def test_few_steps_noise_again_with_fresh_noise(own):
    """A student that makes x0 = x of it, so that the whole way can be written down."""
    angles = torch.tensor([1.5, 1.0, 0.5], dtype=torch.float64)
    noise = normal(5, 2, seed=1)
    given = angles[:, None].expand(3, 5) if own else angles

    def velocity(point, level):
        t = angle_of(level)[:, None]
        x = point * (t.cos() + t.sin())
        prediction = (t.cos() * x - x) / t.sin()
        return prediction * (t.cos() + t.sin()) - (t.cos() - t.sin()) * x

    found = few_steps(velocity, noise, given, generator(3))
    draws = generator(3)
    fresh = [torch.randn(5, 2, generator=draws, dtype=torch.float64) for _ in angles]
    expected = angles[0].sin() * noise
    for angle, added in zip(angles[1:], fresh[1:], strict=True):
        expected = angle.cos() * expected + angle.sin() * added
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_gradients_flow_through_the_last_step_alone():
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    calls = []

    def velocity(point, level):
        calls.append(level)
        return point * weights[len(calls) - 1]

    few_steps(velocity, normal(2, 2), torch.tensor([1.5, 1.0, 0.5]), generator()).sum().backward()
    assert len(calls) == 3
    assert weights.grad[:2].tolist() == [0, 0] and weights.grad[2] != 0
    with torch.no_grad():
        calls.clear()
        angles = torch.tensor([1.5, 1.0])
        assert not few_steps(velocity, normal(2, 2), angles, generator()).requires_grad


def test_falling_angles():
    angles = torch.tensor([[1.5, 1.5], [0.3, 1.2], [0.9, 1.4]])
    assert falling(angles).tolist() == torch.tensor([[1.5, 1.5], [0.3, 1.2], [0.3, 1.2]]).tolist()


@pytest.mark.parametrize(("length", "gamma"), [(0.1, 6.94), (0.05, 16.97)])
def test_power_of_the_average(length, gamma):
    """The values of EDM2, and the equation that they solve."""
    power = power_of(length)
    assert power == pytest.approx(gamma, abs=0.005)
    variance = (power + 1) / ((power + 2) ** 2 * (power + 3))
    assert variance == pytest.approx(length**2, rel=1e-9)


@pytest.mark.parametrize("length", [0.0, 0.3, -0.1, math.nan])
def test_a_length_without_an_average_is_refused(length):
    with pytest.raises(ValueError, match=r"between 0 and 0\.288"):
        PowerEMA([], length)


def test_the_first_weights_replace_the_average():
    assert decay(0, 0.1) == 0
    assert decay(1, 0.1) == pytest.approx(0.5 ** (power_of(0.1) + 1))


def test_the_average_is_of_the_stated_length():
    """Weights that say when they were: their average's spread over time is the length."""
    total, length = 4000, 0.1
    share = torch.zeros(total, dtype=torch.float64)  # of each update in the average
    for updates in range(total):
        kept = decay(updates, length)
        share *= kept
        share[updates] = 1 - kept
    when = (torch.arange(total, dtype=torch.float64) + 1) / total
    mean = (share * when).sum()
    spread = (share * (when - mean) ** 2).sum().sqrt()
    assert share.sum().item() == pytest.approx(1)
    assert spread.item() == pytest.approx(length, rel=0.01)


def test_the_average_is_kept_in_float32():
    weights = [torch.ones(3, dtype=torch.bfloat16), *(torch.ones(2, 2) for _ in range(40))]
    ema = PowerEMA(weights, 0.1)
    expected = 0.0
    for updates in range(5):
        for weight in weights:
            weight.fill_(updates)
        ema.update(weights, updates, torch.tensor(True))
        before = [average.clone() for average in ema.tensors]
        ema.update([weight + 1 for weight in weights], updates, torch.tensor(False))
        assert all(map(torch.equal, ema.tensors, before))
        expected += (1 - decay(updates, 0.1)) * (updates - expected)
    for average, weight in zip(ema.tensors, weights, strict=True):
        torch.testing.assert_close(average, torch.full(weight.shape, expected))
