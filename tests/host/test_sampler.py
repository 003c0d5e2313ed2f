"""rCM as a ComfyUI sampler: noise, callbacks, cancel, masks, and equality with stock samplers."""

import logging

import goldens
import in_comfyui
import pytest
import torch
from in_comfyui import comfy
from turbodiffusion_pack.turbo_core.host import sampler
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.sampler import (
    STEP_NOISE_SEED,
    rcm_sampler,
    sde_step,
    step_noise_sampler,
)
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

# A GPU computes in bf16, the CPU in fp32.
EXACT = 1e-2 if torch.cuda.is_available() else 1e-5
SEEDS = (0, 1, 123456789, 2**64 - 1)
# Newer hosts add 1 to a seed on the CPU, and 2**64 - 1 is the largest that torch takes.
LAST_STEP_SEED = 2**64 - 1 - STEP_NOISE_SEED


@pytest.fixture(scope="module")
def model(paths):
    return load_turbo_model(paths[0])


@pytest.fixture(scope="module")
def dense_model(paths):
    """Float weights, dense attention: small differences in x stay small in the output."""
    model = load_turbo_model(paths[1])
    return patch_attention(model, SLASettings("dense"))


def _latent(batch=1, frames=3, size=16):
    return torch.zeros(batch, 16, frames, size, size)


def _context(batch=1):
    return goldens.load("rcm")["t2v.context"].expand(batch, -1, -1)


def _run(model, sampler, sigmas=None, latent=None, seed=0, noise=None, **options):
    """A run through ComfyUI's guider; latents in ComfyUI's own space go in and come out."""
    sigmas = rcm_sigmas(3, 80) if sigmas is None else sigmas
    latent = _latent() if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed) if noise is None else noise
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[in_comfyui.pad_context(_context()), {}]]})
    guider.set_cfg(1.0)
    return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=seed, **options)


def _record_noise(monkeypatch):
    """The noises of all SDE steps from here on."""
    noises = []
    step = sde_step

    def recording(denoised, noise, sigma_next):
        noises.append(noise)
        return step(denoised, noise, sigma_next)

    monkeypatch.setattr(sampler, "sde_step", recording)
    return noises


def _alike(a, b):
    return abs(torch.corrcoef(torch.stack([a.cpu().flatten(), b.cpu().flatten()]))[0, 1]) > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_step_noise_never_repeats_the_initial_noise(model, monkeypatch, seed):
    noises = _record_noise(monkeypatch)
    _run(model, rcm_sampler("sde"), rcm_sigmas(4, 80), seed=seed)
    assert len(noises) == 3
    neighbours = [s for s in (seed - 1, seed, seed + 1, seed + 2) if 0 <= s < 2**64]
    initial = [comfy.sample.prepare_noise(_latent(), s) for s in neighbours]
    drawn = [*initial, *noises]
    pairs = [(i, j) for j in range(len(drawn)) for i in range(j)]
    assert [(i, j) for i, j in pairs if _alike(drawn[i], drawn[j])] == []


def test_step_noise_of_comfyui_itself_would_repeat_a_seed():
    """Why the step seed is moved: on a CPU ComfyUI's own draws repeat the noise of a near seed."""
    latent = _latent()
    stock = comfy.k_diffusion.sampling.default_noise_sampler(latent, seed=7)(None, None)
    initial = [comfy.sample.prepare_noise(latent, seed) for seed in (7, 8)]
    assert any(_alike(stock, noise) for noise in initial)


def test_every_seed_works():
    latent = _latent(size=2)
    for seed in (*SEEDS, LAST_STEP_SEED, LAST_STEP_SEED - 1, LAST_STEP_SEED + 1):
        noise = step_noise_sampler(latent, seed)(None, None)
        assert noise.shape == latent.shape


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_no_step_looks_at_a_sigma(monkeypatch, mode):
    """To look at one on a GPU is to wait until the GPU has nothing left to do."""
    monkeypatch.setattr(sampler, "_require_flow", lambda model: None)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: pytest.fail("a tensor was looked at"))
    options = {"mode": mode, "noise_sampler": lambda *_: torch.ones(2)}
    x = sampler.sample_rcm(lambda x, _: x / 2, torch.ones(2), rcm_sigmas(3, 80.0), **options)
    assert x.isfinite().all().item()


def test_a_run_repeats_with_its_seed_and_changes_with_another(model):
    noise = comfy.sample.prepare_noise(_latent(), 5)
    sde = rcm_sampler("sde")
    first = _run(model, sde, seed=5, noise=noise)
    assert torch.equal(_run(model, sde, seed=5, noise=noise), first)
    assert goldens.relative_error(_run(model, sde, seed=6, noise=noise), first) > 0.1


def test_ode_draws_no_noise(model):
    ode = rcm_sampler("ode")
    ode.extra_options["noise_sampler"] = lambda *_: pytest.fail("ODE asked for noise")
    noise = comfy.sample.prepare_noise(_latent(), 5)
    assert torch.equal(_run(model, ode, seed=5, noise=noise), _run(model, ode, seed=6, noise=noise))


@pytest.mark.parametrize("mode", ["sde", "ode"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_callback_comes_once_a_step_with_the_whole_state(dense_model, monkeypatch, mode, steps):
    states, seen, inputs = [], [], []
    sampler = rcm_sampler(mode)
    inner = sampler.sampler_function

    def watched(model, x, sigmas, callback=None, **options):
        inputs.append(x)

        def both(state):
            states.append(state)
            callback(state)

        return inner(model, x, sigmas, callback=both, **options)

    sampler.sampler_function = watched
    sigmas, latent = rcm_sigmas(steps, 80), _latent()

    def preview(step, x0, x, total):
        seen.append((step, x0.shape, x.shape, total))
        assert x0.isfinite().all()

    out = _run(dense_model, sampler, sigmas, latent, callback=preview)
    assert seen == [(i, latent.shape, latent.shape, steps) for i in range(steps)]
    assert all(set(s) >= {"x", "i", "sigma", "sigma_hat", "denoised"} for s in states)
    assert [s["i"] for s in states] == list(range(steps))
    assert torch.equal(torch.stack([s["sigma"] for s in states]).cpu(), sigmas[:-1])
    assert torch.equal(states[0]["x"], inputs[0])
    last = dense_model.model.process_latent_out(states[-1]["denoised"])
    assert goldens.relative_error(out, last) < EXACT


def test_cancel_stops_the_run_and_leaves_a_clean_model(model, caplog):
    caplog.set_level(logging.INFO)
    sde = rcm_sampler("sde")
    undisturbed = _run(model, sde)
    caplog.clear()
    steps = []

    def cancel(step, *_):
        steps.append(step)
        comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        _run(model, sde, callback=cancel)
    assert steps == [0]
    (line,) = _report_lines(caplog)
    assert line.startswith("TurboDiffusion: cancelled, 2 forward passes; SLA in 2 of 2 blocks")
    assert not comfy.model_management.processing_interrupted()
    caplog.clear()
    assert torch.equal(_run(model, sde), undisturbed)
    (line,) = _report_lines(caplog)
    assert line.startswith("TurboDiffusion: 3 forward passes; SLA in 2 of 2 blocks")


def _report_lines(caplog):
    return [m for m in caplog.messages if "forward pass" in m]


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_a_batch_equals_its_single_runs(dense_model, mode):
    noise = comfy.sample.prepare_noise(_latent(batch=2), 3)
    sigmas = rcm_sigmas(3, 80)
    steps = [comfy.sample.prepare_noise(_latent(batch=2), seed) for seed in (20, 21)]

    def run(part):
        sampler, left = rcm_sampler(mode), iter(steps)
        sampler.extra_options["noise_sampler"] = lambda *_: next(left)[part].to(in_comfyui.DEVICE)
        return _run(dense_model, sampler, sigmas, torch.zeros_like(noise[part]), noise=noise[part])

    both = run(slice(0, 2))
    singles = torch.cat([run(slice(i, i + 1)) for i in range(2)])
    assert goldens.relative_error(both, singles) < EXACT
    assert goldens.relative_error(both[:1], both[1:]) > 0.1


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_a_masked_region_keeps_its_latent(dense_model, mode):
    latent = torch.randn(_latent().shape, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 3, 16, 16)
    mask[..., 8:] = 1
    sampler = rcm_sampler(mode)
    out = _run(dense_model, sampler, latent=latent, denoise_mask=mask)
    assert goldens.relative_error(out[..., :8], latent[..., :8]) < EXACT
    assert goldens.relative_error(out[..., 8:], latent[..., 8:]) > 0.1
    whole = _run(dense_model, sampler, latent=latent)
    assert goldens.relative_error(whole[..., :8], latent[..., :8]) > 0.1


def _stock(mode):
    """ComfyUI's own lcm or euler; a new one draws the same noises again."""
    if mode == "ode":
        return comfy.samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_euler)
    noises = iter([comfy.sample.prepare_noise(_latent(), seed) for seed in range(10, 20)])
    options = {"noise_sampler": lambda *_: next(noises).to(in_comfyui.DEVICE)}
    return comfy.samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_lcm, options)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_equals_the_stock_sampler_of_the_same_rule(dense_model, mode, steps):
    ours = rcm_sampler(mode)
    stock = _stock(mode)
    ours.extra_options |= _stock(mode).extra_options
    sigmas = rcm_sigmas(steps, 80)
    expected = _run(dense_model, stock, sigmas)
    assert goldens.relative_error(_run(dense_model, ours, sigmas), expected) < EXACT


def test_the_other_rule_is_far_from_the_stock_sampler(dense_model):
    out = _run(dense_model, rcm_sampler("sde"))
    assert goldens.relative_error(out, _run(dense_model, _stock("ode"))) > 0.1


def test_split_sigmas_continue_a_run(dense_model):
    """Two samplers in a row on halves of the sigmas, the second without new noise."""
    ode, sigmas = rcm_sampler("ode"), rcm_sigmas(4, 80)
    whole = _run(dense_model, ode, sigmas)
    half = _run(dense_model, ode, sigmas[:3])
    rest = _run(dense_model, ode, sigmas[2:], latent=half, noise=torch.zeros_like(half))
    assert goldens.relative_error(rest, whole) < EXACT


def test_the_longest_schedule_runs(dense_model):
    seen = []
    out = _run(
        dense_model,
        rcm_sampler("sde"),
        rcm_sigmas(100, 80),
        _latent(frames=1, size=4),
        callback=lambda step, *_: seen.append(step),
    )
    assert seen == list(range(100))
    assert out.isfinite().all()
