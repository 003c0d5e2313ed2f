"""Wrong use is told in the log, once a run, and refused nowhere."""

import logging

import in_comfyui
import pytest
import tiny_models
import torch
from in_comfyui import comfy
from turbodiffusion_pack.turbo_core.host.experts import switch_experts
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

NO_IMAGE = "TurboDiffusion: this model animates a picture and gets none"
IMAGE = torch.zeros(1, 20, 1, 8, 8)  # mask and latent


def _load(folder, name, tensors):
    torch.save(tensors, folder / name)
    return patch_attention(load_turbo_model(str(folder / name)), SLASettings("dense"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def i2v(folder):
    return _load(folder, "i2v.pth", tiny_models.i2v_checkpoint(0))


def _warnings(caplog, model, sampler, sigmas, image=None):
    """The warnings of a run, in order."""
    caplog.set_level(logging.INFO)
    caplog.clear()
    noise, context = torch.randn(1, 16, 1, 8, 8), torch.zeros(1, 4, 64)
    in_comfyui.sample(model, sampler, sigmas, noise, context, image=image)
    records = [r for r in caplog.records if r.levelno == logging.WARNING]
    return [r.getMessage() for r in records if "TurboDiffusion: " in r.getMessage()]


def test_a_model_used_as_its_authors_do(i2v, caplog):
    assert _warnings(caplog, i2v, rcm_sampler("ode"), rcm_sigmas(1, 200), IMAGE) == []


def test_an_image_model_without_an_image_and_with_the_settings_for_text(i2v, caplog):
    image, start, mode = _warnings(caplog, i2v, rcm_sampler("sde"), rcm_sigmas(1, 80))
    assert mode.startswith("TurboDiffusion: mode is sde")
    assert start.startswith("TurboDiffusion: sigma_max is 80") and image.startswith(NO_IMAGE)


def test_both_experts_tell_it_once(i2v, folder, caplog):
    low = _load(folder, "low.pth", tiny_models.i2v_checkpoint(1))
    model = switch_experts(i2v, low, 0.9)
    (told,) = _warnings(caplog, model, rcm_sampler("ode"), rcm_sigmas(4, 200))
    assert told.startswith(NO_IMAGE)


def test_a_text_model_with_an_image_and_a_second_distillation(folder, caplog):
    model = _load(folder, "t2v.pth", tiny_models.t2v_checkpoint(0)).clone()
    key = "diffusion_model.time_embedding.2.bias"
    model.add_patches({key: ("diff", (torch.zeros(256),))})
    euler, sigmas = comfy.samplers.sampler_object("euler"), rcm_sigmas(5, 80)
    image, steps, retimed = _warnings(caplog, model, euler, sigmas, IMAGE)
    assert "5 steps" in steps and "distilled already" in retimed and "not looked at" in image


def test_another_packs_guidance_stops_no_run(i2v):
    class Scheduled(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            self.cfg = 1.0
            return super().predict_noise(x, timestep, model_options or {}, seed)

    guider = Scheduled(i2v)
    context = in_comfyui.pad_context(torch.zeros(1, 4, 64))
    guider.inner_set_conds({"positive": [[context, {}]]})
    guider.cfg = [5.0, 1.0]
    noise, sampler = torch.randn(1, 16, 1, 8, 8), rcm_sampler("ode")
    out = guider.sample(noise, 0 * noise, sampler, rcm_sigmas(1, 200), disable_pbar=True)
    assert out.isfinite().all()


def test_a_model_without_projections_is_any_model(folder, caplog):
    tensors = {n: t for n, t in tiny_models.i2v_checkpoint(0).items() if "proj_l" not in n}
    model = _load(folder, "plain.pth", tensors)
    assert _warnings(caplog, model, rcm_sampler("sde"), rcm_sigmas(5, 80)) == []
