"""The estimate's formulas against what torch counts in the network itself."""

import dataclasses

import in_comfyui  # noqa: F401 - ComfyUI comes into the process with it
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from turbodiffusion_pack.turbo_core.checkpoint.sizes import Sizes
from turbodiffusion_pack.turbo_core.host.wan_network import build_network, load_weights
from turbodiffusion_pack.turbo_core.training.estimate import (
    BACKWARD,
    described,
    enough_gpus,
    estimate,
    forward_work,
)
from turbodiffusion_pack.turbo_core.training.initial_weights import initial_weights
from turbodiffusion_pack.turbo_core.training.presets import PRESETS

SMALL = dataclasses.replace(
    PRESETS["toy"],
    sizes=Sizes(dim=256, ffn_dim=512, num_layers=2, in_channels=16),
    latent=(2, 16, 32),
    context=32,
)


@pytest.fixture(autouse=True)
def outside_inference_mode():
    with torch.inference_mode(False):
        yield


def test_forward_and_backward_work_are_what_torch_counts():
    network = build_network(SMALL.sizes)
    load_weights(network, initial_weights(SMALL.sizes, seed=0))
    x = torch.randn(1, 16, *SMALL.latent)
    # torch counts no fused attention on a CPU, and its plain one keeps the scores: 4 products back
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        velocity = network(x, torch.tensor([500.0]), torch.randn(1, SMALL.context, 4096))
    with FlopCounterMode(display=False) as backward:
        velocity.square().mean().backward()
    work = forward_work(SMALL)
    assert forward.get_total_flops() == pytest.approx(sum(work.values()), rel=0.01)
    factors = {**BACKWARD, "dense": 2.0}
    expected = sum(flops * factors[kind] for kind, flops in work.items())
    assert backward.get_total_flops() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("name", "parameters"), [("1.3B-480P", 1_418_996_800), ("toy", None)])
def test_parameters(name, parameters):
    preset = PRESETS[name]
    with torch.device("meta"):
        network = build_network(preset.sizes, device="meta")
    found = estimate(preset, "sla").parameters
    assert found == sum(p.numel() for p in network.parameters())
    assert parameters in (None, found)


def test_known_costs():
    """One forward pass of 1.3B at 480p is 0.29 PFLOP, 0.20 of them attention."""
    work = forward_work(PRESETS["1.3B-480P"])
    assert sum(work.values()) == pytest.approx(0.29e15, rel=0.03)
    assert work["dense"] == pytest.approx(0.20e15, rel=0.03)
    sparse = forward_work(PRESETS["1.3B-480P"], PRESETS["1.3B-480P"].sla)["sparse"]
    assert sparse == pytest.approx(0.1 * 4 * 32760**2 * 1536 * 30, rel=0.01)


def test_states_are_split_over_the_processes():
    one, four = (estimate(PRESETS["14B-480P"], "rcm", n) for n in (1, 4))
    assert one.states["fake score"]["moments"] == 8 * one.parameters
    assert four.states["fake score"]["moments"] == 2 * one.parameters
    assert four.activations == one.activations


def test_enough_gpus_divide_the_batch():
    large = PRESETS["14B-480P"]
    assert enough_gpus(PRESETS["1.3B-480P"], "sla") == 1
    assert enough_gpus(large, "sla") == 16  # 9 have the memory, but 32 slots
    assert enough_gpus(large, "sla", size=40e9) == 0  # the activations alone fill them


def test_it_is_told_as_an_estimate():
    told = described("toy-cpu", PRESETS["toy-cpu"], "rcm", torch.device("cpu"))
    assert told.startswith("estimate    rcm of preset toy-cpu, 1 x CPU; nothing is started\n")
    for line in ("parameters", "memory", "fits", "disk", "steps", "work", "time here", "on H100s"):
        assert f"\n{line} " in told
