"""What the learning rate is at which step."""

import pack  # noqa: F401
import pytest
from turbodiffusion_pack.turbo_core.training.learner import cosine, falling_at_last, warmed_up


def test_it_rises_and_stays():
    assert [warmed_up(8.0, n, 4) for n in range(6)] == [2, 4, 6, 8, 8, 8]


def test_it_falls_over_the_last_share_of_the_steps():
    rates = [falling_at_last(8.0, n, 2, 10, 0.4) for n in range(10)]
    assert rates == pytest.approx([4, 8, 8, 8, 8, 8, 8, 6, 4, 2])


def test_without_a_fall_it_stays():
    assert [falling_at_last(8.0, n, 2, 4, 0.0) for n in range(4)] == [4, 8, 8, 8]


def test_a_cosine_ends_near_nothing():
    rates = [cosine(1.0, n, 1, 100) for n in range(100)]
    assert rates[0] == 1 and rates[50] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
