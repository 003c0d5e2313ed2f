"""rCM in ComfyUI's own KSampler and BasicScheduler, as scheduler `rcm`."""

import gc
import importlib.util
import weakref

import goldens
import in_comfyui
import parity
import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicScheduler
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from in_comfyui import comfy
from turbodiffusion_pack.turbo_core.host import scheduler
from turbodiffusion_pack.turbo_core.host.experts import switch_experts
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.quantize_model import quantize_model
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

import nodes

# Of the last states: python tests/prepare.py tests/support/parity_margins.py measures the room.
BOUND = 5e-3
MODES = {"sde": "lcm", "ode": "euler"}
samplers = comfy.samplers


@pytest.fixture(scope="module", autouse=True)
def registered():
    scheduler.register_scheduler()


@pytest.fixture(scope="module")
def text_model(paths):
    return load_turbo_model(paths[0], "exact")


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """The image-to-video models, high noise first."""
    folder = tmp_path_factory.mktemp("i2v")
    names = ("i2v_high-quant.pth", "i2v_low-quant.pth")
    files = [goldens.unpack_checkpoint(name, folder) for name in names]
    return [load_turbo_model(str(file)) for file in files]


@pytest.fixture(scope="module")
def image_model(experts):
    return experts[0]


@pytest.fixture(scope="module")
def dense_model(paths):
    """Float weights, dense attention: small differences in x stay small in the output."""
    model = load_turbo_model(paths[1])
    return patch_attention(model, SLASettings("dense"))


def _sigmas(model, steps=4, denoise=1.0):
    """What BasicScheduler gives; KSampler must take the same."""
    sigmas = BasicScheduler.execute(model, "rcm", steps, denoise).args[0]
    stock = samplers.KSampler(model, steps, "cpu", "lcm", "rcm", denoise)
    assert torch.equal(stock.sigmas, sigmas)
    return sigmas


def _shifted(model, shift=3.0):
    return ModelSamplingSD3().patch(model, shift)[0]


def _with_lora(model):
    name = "diffusion_model.blocks.0.self_attn.q"
    halves = {"lora_A": torch.ones(1, 256), "lora_B": torch.ones(256, 1)}
    lora = {f"{name}.{half}.weight": weight for half, weight in halves.items()}
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


def _in_sla(model):
    return patch_attention(model, SLASettings("sla", 0.3))


def _ksampler(model, mode, noise, latent=None, steps=4, scheduler="rcm", denoise=1.0):
    """What the KSampler node runs, on the golden prompt; the last state in model space."""
    context = in_comfyui.pad_context(goldens.load("rcm")["t2v.context"])
    conds = [[context, {}]]
    latent = torch.zeros_like(noise) if latent is None else latent
    settings = model, noise, steps, 1.0, MODES[mode], scheduler, conds, conds, latent
    out = comfy.sample.sample(*settings, denoise=denoise, disable_pbar=True, seed=0)
    return model.model.process_latent_in(out)


@pytest.fixture
def golden_noise(monkeypatch):
    """lcm draws the noises of the recorded runs; the first of all is returned."""
    data = goldens.load("rcm")

    def recorded(x, seed=None):
        noises = iter([data[f"t2v.noise{i}"] for i in (1, 2, 3, 4)])
        return lambda sigma, sigma_next: next(noises).to(x)

    monkeypatch.setattr(comfy.k_diffusion.sampling, "default_noise_sampler", recorded)
    return data["t2v.noise0"]


# Registration


def _offered() -> list[list[str]]:
    """Every list that a user or a node chooses a scheduler from."""
    (basic,) = (i for i in BasicScheduler.define_schema().inputs if i.id == "scheduler")
    lists = [samplers.SCHEDULER_NAMES, samplers.KSampler.SCHEDULERS, basic.options]
    for node in (nodes.KSampler, nodes.KSamplerAdvanced):
        lists.append(node.INPUT_TYPES()["required"]["scheduler"][0])
    return lists


def _loaded_again():
    """host/scheduler.py as a second load of the pack has it: a module of its own."""
    name = "turbodiffusion_pack.turbo_core.host.scheduler_again"
    spec = importlib.util.spec_from_file_location(name, scheduler.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_offered_once_and_last():
    for offered in _offered():
        assert offered.count("rcm") == 1
        assert offered[0] != "rcm", "the default of every node is the first one"


def test_loading_the_pack_again_replaces_it_and_offers_it_once():
    again = _loaded_again()
    try:
        again.register_scheduler()
        assert samplers.SCHEDULER_HANDLERS["rcm"].handler is again.rcm_schedule
        assert all(offered.count("rcm") == 1 for offered in _offered())
    finally:
        scheduler.register_scheduler()
    assert samplers.SCHEDULER_HANDLERS["rcm"].handler is scheduler.rcm_schedule


def test_a_list_that_another_pack_has_replaced_gets_it_too(monkeypatch):
    monkeypatch.setattr(samplers.KSampler, "SCHEDULERS", ["simple", "theirs"])
    scheduler.register_scheduler()
    assert samplers.KSampler.SCHEDULERS == ["simple", "theirs", "rcm"]
    assert samplers.SCHEDULER_NAMES.count("rcm") == 1


def test_the_rcm_of_another_pack_stays(monkeypatch, caplog):
    theirs = samplers.SchedulerHandler(lambda model_sampling, steps: torch.zeros(steps + 1))
    monkeypatch.setitem(samplers.SCHEDULER_HANDLERS, "rcm", theirs)
    scheduler.register_scheduler()
    assert samplers.SCHEDULER_HANDLERS["rcm"] is theirs
    assert "another node pack has a scheduler named rcm" in caplog.text
    assert "rCMSampler" in caplog.text


# Sigmas


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8, 50])
def test_the_same_sigmas_as_the_rcm_sampler(text_model, image_model, steps):
    assert torch.equal(_sigmas(text_model, steps), rcm_sigmas(steps, 80))
    assert torch.equal(_sigmas(image_model, steps), rcm_sigmas(steps, 200))


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_the_sigmas_of_the_original(text_model, image_model, steps):
    for model, sigma_max in ((text_model, 80), (image_model, 200)):
        recorded = goldens.load("rcm")[f"t2v.steps{steps}.smax{sigma_max}.ode.sigmas"]
        torch.testing.assert_close(_sigmas(model, steps), recorded, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "chain",
    [
        [_shifted],
        [_shifted, _shifted],
        [_with_lora, _shifted],
        [_shifted, _with_lora],
        [_in_sla, _shifted, _in_sla],
        [_shifted, lambda model: model.clone().clone()],
    ],
    ids=["shift", "two shifts", "lora, shift", "shift, lora", "sla, shift, sla", "clones"],
)
def test_sigma_max_survives_every_patch(image_model, chain):
    patched = image_model
    for patch in chain:
        patched = patch(patched)
    assert torch.equal(_sigmas(patched), rcm_sigmas(4, 200))
    assert torch.equal(_sigmas(image_model), rcm_sigmas(4, 200))
    assert scheduler.carried_sigma_max(patched) == 200


def test_two_experts_start_where_the_first_does(experts):
    both = switch_experts(*experts, 0.9)
    assert torch.equal(_sigmas(both), rcm_sigmas(4, 200))
    assert torch.equal(_sigmas(_shifted(both)), rcm_sigmas(4, 200))


def test_a_quantized_model_keeps_it(paths):
    model = load_turbo_model(paths[1])
    scheduler.carry_sigma_max(model, 200)
    quantized, _ = quantize_model(_shifted(model))
    assert torch.equal(_sigmas(quantized), rcm_sigmas(4, 200))
    assert torch.equal(_sigmas(_shifted(quantized)), rcm_sigmas(4, 200))


def test_models_side_by_side_keep_their_own(text_model, image_model):
    for model, sigma_max in ((text_model, 80), (image_model, 200)) * 2:
        assert torch.equal(_sigmas(_shifted(model)), rcm_sigmas(4, sigma_max))


def test_a_loaded_model_keeps_its_own(text_model, image_model):
    """While a patched clone is loaded its model_sampling sits on the model of all clones."""
    shifted = _shifted(image_model)
    comfy.model_management.load_models_gpu([shifted, text_model])
    for model, sigma_max in ((image_model, 200), (shifted, 200), (text_model, 80)):
        assert torch.equal(_sigmas(model), rcm_sigmas(4, sigma_max))
    comfy.model_management.load_models_gpu([image_model])


def test_a_model_of_another_loader_starts_from_80(image_model):
    """Even with 36 input channels: how it was distilled is not known."""
    stock = comfy.model_patcher.ModelPatcher(image_model.model, "cpu", "cpu")
    stock = _shifted(stock)
    assert scheduler.carried_sigma_max(stock) == 80
    assert torch.equal(_sigmas(stock), rcm_sigmas(4, 80))


def test_models_are_not_kept_alive(paths):
    model = load_turbo_model(paths[1])
    clone = weakref.ref(model.clone())
    gc.collect()
    assert clone() is None


def test_a_model_that_is_no_flow_model_is_refused():
    class Diffusion(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    with pytest.raises(ValueError, match="rectified-flow models such as Wan, got a MODEL with "):
        samplers.calculate_sigmas(Diffusion(), "rcm", 4)


# Runs

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the accuracy of fp32")


@on_cpu
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_last_state_of_the_original(text_model, golden_noise, mode, steps):
    run = parity.Run("t2v", steps, 80, mode)
    with parity.at_block_maps(goldens.load("block_maps")[str(run)]):
        out = _ksampler(_in_sla(text_model), mode, golden_noise, steps=steps)
    assert goldens.relative_error(out, goldens.load("rcm")[f"{run}.x"]) <= BOUND


@on_cpu
@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_another_scheduler_misses_the_bound(text_model, golden_noise, mode):
    recorded = goldens.load("rcm")[f"t2v.steps4.smax80.{mode}.x"]
    out = _ksampler(_in_sla(text_model), mode, golden_noise, scheduler="simple")
    assert goldens.relative_error(out, recorded) > BOUND


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_a_shift_changes_nothing(text_model, golden_noise, mode):
    out = _ksampler(text_model, mode, golden_noise)
    assert torch.equal(_ksampler(_shifted(text_model, 12.0), mode, golden_noise), out)


# Denoise below 1


@pytest.mark.parametrize(
    ("steps", "denoise", "start"),
    [
        (4, 0.75, 4 / 20),  # int(4 / 0.75) = 5 steps, of which the first is left out
        (4, 0.5, 1 / 2),
        (4, 0.25, 3 / 4),
        (8, 0.5, 1 / 2),
        (8, 0.9, 0),  # int(8 / 0.9) is 8: nothing to leave out
        (20, 0.1, 9 / 10),
    ],
)
def test_denoise_starts_on_the_way(text_model, steps, denoise, start):
    """The angles [atan(80), 1.5, 1.4, 1, 0] are entered at `start` of their length."""
    sigmas = _sigmas(text_model, steps, denoise)
    assert len(sigmas) == steps + 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    knots = torch.tensor([80.0, 0, 0, 0, 0]).atan()
    knots[1:] = torch.tensor([1.5, 1.4, 1.0, 0.0])
    left = min(int(4 * start), 3)
    angle = torch.lerp(knots[left], knots[left + 1], 4 * start - left)
    torch.testing.assert_close(sigmas[0], angle.sin() / (angle.sin() + angle.cos()))


@pytest.mark.parametrize(("denoise", "angle"), [(0.5, 1.5), (1 / 3, 1.4), (0.25, 1.0)])
def test_one_step_starts_at_a_trained_angle(text_model, denoise, angle):
    (start, end) = _sigmas(text_model, 1, denoise)
    torch.testing.assert_close(start, torch.tensor(angle).tan() / (1 + torch.tensor(angle).tan()))
    assert end == 0


@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_less_denoise_keeps_more_of_the_latent(dense_model, mode):
    noise = goldens.load("rcm")["t2v.noise0"]
    latent = torch.randn(noise.shape, generator=torch.Generator().manual_seed(5))
    inside = dense_model.model.process_latent_in(latent)
    kept = []
    for denoise in (0.0001, 0.1, 0.25, 0.5, 0.75, 1.0):
        steps = 1 if denoise < 0.1 else 4
        out = _ksampler(dense_model, mode, noise, latent, steps, denoise=denoise)
        kept.append(goldens.relative_error(out, inside))
    assert kept[0] < 0.05
    assert kept == sorted(kept)


def test_the_first_state_holds_its_share_of_the_latent(dense_model, monkeypatch):
    """x = s noise + (1 - s) latent at the first sigma s, in model space."""
    noise = goldens.load("rcm")["t2v.noise0"]
    latent = torch.randn(noise.shape, generator=torch.Generator().manual_seed(5))
    seen = []

    def only_look(model, x, sigmas, **kwargs):
        seen.append((x, sigmas))
        return x

    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_euler", only_look)
    _ksampler(dense_model, "ode", noise, latent, denoise=0.5)
    ((x, sigmas),) = seen
    start = rcm_sigmas(8, 80)[4]
    assert torch.equal(sigmas.cpu(), rcm_sigmas(8, 80)[4:])
    expected = start * noise + (1 - start) * dense_model.model.process_latent_in(latent)
    assert goldens.relative_error(x, expected) < 1e-6


def test_no_denoise_gives_the_latent_back(dense_model):
    noise = goldens.load("rcm")["t2v.noise0"]
    latent = torch.randn(noise.shape, generator=torch.Generator().manual_seed(5))
    assert len(_sigmas(dense_model, 4, 0.0)) == 0
    out = _ksampler(dense_model, "ode", noise, latent, denoise=0.0)
    assert goldens.relative_error(out, dense_model.model.process_latent_in(latent)) < 1e-6
