"""A forward pass with TMA, fp8 and NVRTC switched off, as on cards that have none of them."""

import goldens
import in_comfyui
import older_cards
import pytest
import torch
from devices import CARD
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model

BOUND = 3e-2  # to the same pass on the real card, whose attention may run in fp8


def forward(path: str, granularity: str) -> torch.Tensor:
    data = goldens.load("forward")
    key = min(key for key in data if key.endswith(".x") and key.startswith("t2v"))
    model = load_turbo_model(path, granularity)
    return in_comfyui.velocity(model, data[key], data[f"{key.removesuffix('.x')}.context"], 600.0)


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["fast", "exact"])
@pytest.mark.parametrize("card", [older_cards.AMPERE, older_cards.ADA, older_cards.HOPPER], ids=str)
def test_forward(paths, monkeypatch, granularity, card):
    if card > CARD:
        pytest.skip("this GPU is older")
    expected = forward(paths[0], granularity)
    older_cards.pretend(monkeypatch, card)
    assert goldens.relative_error(forward(paths[0], granularity), expected) <= BOUND
