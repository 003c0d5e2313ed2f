"""What a test draws does not depend on the tests before it."""

import random

import numpy
import pytest
import torch
from devices import DEVICE


@pytest.fixture(scope="module")
def drawn() -> list:
    return []


@pytest.mark.parametrize("turn", ["first", "second"])
def test_every_test_draws_the_same_numbers(turn, drawn):
    on_device = torch.rand(2, device=DEVICE).tolist()
    drawn.append([*on_device, torch.rand(1).item(), numpy.random.rand(), random.random()])
    assert drawn[0] == drawn[-1]
