"""Whole rCM runs through ComfyUI's sampler, against the last states of the original's runs.

How much room the bounds leave: python tests/prepare.py tests/support/parity_margins.py
"""

import goldens
import in_comfyui
import parity
import pytest
import torch
from attention import misplaced
from parity import run_error
from turbodiffusion_pack.turbo_core.host.experts import switch_experts
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas

BOUND = 5e-3
# Of the best scores in float64, in units of a row's std.
NEAR_TIE = 5e-2
ROUNDING = 1e-4
RUNS = parity.runs("t2v")
# Image to video has fewer last states on record, but the experts of every run.
I2V_RUNS = parity.runs("i2v")
BOUNDARY = 0.9

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the accuracy of fp32")


@pytest.fixture(scope="module", autouse=True)
def models():
    yield
    parity.load.cache_clear()


def _experts(granularity="exact"):
    """The high-noise and the low-noise expert."""
    return [parity.in_sla(f"i2v_{name}-quant.pth", granularity) for name in ("high", "low")]


def _model(run, granularity="exact"):
    if run.model == "i2v":
        return switch_experts(*_experts(granularity), BOUNDARY)
    return parity.in_sla("t2v-quant.pth", granularity)


def _at_the_originals_maps(run):
    return parity.at_block_maps(goldens.load("block_maps")[str(run)])


@on_cpu
@pytest.mark.parametrize("run", RUNS + I2V_RUNS, ids=str)
def test_last_state(run):
    with _at_the_originals_maps(run):
        assert run_error(_model(run), run) <= BOUND


@on_cpu
@pytest.mark.parametrize("run", [run for run in RUNS + I2V_RUNS if run.steps == 4], ids=str)
def test_last_state_at_the_default_granularity(run):
    with _at_the_originals_maps(run):
        assert run_error(_model(run, "fast"), run) <= BOUND


@on_cpu
@pytest.mark.parametrize("run", [run for run in RUNS + I2V_RUNS if run.steps == 4], ids=str)
def test_selection(run):
    """Ours is the best one; the original's is too, save where its bf16 decided a near-tie."""
    with _at_the_originals_maps(run) as calls:
        run_error(_model(run), run)
    assert len(calls) == 4 * 2
    for call in calls:
        assert misplaced(call.own, call.scores) <= ROUNDING
        assert misplaced(call.given, call.scores) <= NEAR_TIE


# A single step adds no noise: there both modes are one.
@pytest.mark.parametrize("run", [run for run in RUNS if run.steps in (2, 4)], ids=str)
def test_the_other_mode_misses_the_bound(run):
    other = "ode" if run.mode == "sde" else "sde"
    assert run_error(_model(run), run, mode=other) > 1


@pytest.mark.parametrize("run", [r for r in RUNS if r.steps in (2, 4) and r.mode == "sde"], ids=str)
def test_initial_noise_used_again_misses_the_bound(run):
    assert run_error(_model(run), run, noises=(0, 0, 0)) > 1


# Fresh noise washes the start out: of SDE runs in 2 to 4 steps the last state hardly moves. There
# the sigmas themselves tell, to 1e-6, in tests/core/test_rcm.py.
@on_cpu
@pytest.mark.parametrize("run", [run for run in RUNS if run.mode == "ode"], ids=str)
def test_a_wrong_sigma_max_misses_the_bound(run):
    wrong = {80: 1600, 200: 80, 1600: 80}[run.sigma_max]
    with _at_the_originals_maps(run):
        assert run_error(_model(run), run, sigma_max=wrong) > BOUND


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_experts_of_every_step(run):
    ran, marked = [], []
    for number, expert in enumerate(_experts()):

        def note(executor, *args, number=number, **kwargs):
            ran.append(number)
            return executor(*args, **kwargs)

        marked.append(expert.clone())
        marked[-1].add_wrapper_with_key("diffusion_model", "test", note)
    model, sampler = switch_experts(*marked, BOUNDARY), rcm_sampler(run.mode)
    data = goldens.load("rcm")
    noise = data["i2v.noise0"][..., :1, :4, :4]  # which expert runs does not depend on the size
    in_comfyui.sample(
        model, sampler, rcm_sigmas(run.steps, run.sigma_max), noise, data["i2v.context"]
    )
    assert ran == data[f"{run._replace(model='i2v')}.expert"].tolist()


@pytest.mark.parametrize("run", I2V_RUNS, ids=str)
def test_swapped_experts_miss_the_bound(run):
    swapped = switch_experts(*reversed(_experts()), BOUNDARY)
    assert run_error(swapped, run) > 0.5


@pytest.mark.parametrize("boundary", [0.0, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("run", [run for run in I2V_RUNS if run.steps > 2], ids=str)
def test_a_wrong_boundary_misses_the_bound(run, boundary):
    assert run_error(switch_experts(*_experts(), boundary), run) > 0.05
