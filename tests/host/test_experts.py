"""Wan22ExpertSwitch: two experts in one sampler run, each with what it came with."""

import asyncio
import contextlib
import copy
import logging

import dynamic_vram
import goldens
import in_comfyui
import pytest
import tiny_models
import torch
from in_comfyui import comfy
from turbodiffusion_pack.nodes.experts import Wan22ExpertSwitch
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

management = comfy.model_management
SIGMAS = rcm_sigmas(4, 200)  # two steps above 0.9, two below
SHAPE = (1, 16, 3, 8, 16)  # 96 tokens: two key blocks, the second not whole
FFN = "diffusion_model.blocks.0.ffn.forward"
# The same work in the same order: on the CPU the same to the last bit.
SAME = 1e-3 if torch.cuda.is_available() else 0.0
OTHER = 2e-3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    names = ("i2v_high-quant.pth", "i2v_low-quant.pth", "t2v-quant.pth", "t2v.pth")
    return {name: str(goldens.unpack_checkpoint(name, folder)) for name in names}


def _load(path, attention="sla"):
    model = load_turbo_model(path)
    return patch_attention(model, SLASettings(attention, 0.34))


@pytest.fixture(scope="module")
def loaded(files):
    return _load(files["i2v_high-quant.pth"]), _load(files["i2v_low-quant.pth"])


@pytest.fixture
def high(loaded):
    return loaded[0].clone()


@pytest.fixture
def low(loaded):
    return loaded[1].clone()


def _switch(high, low, boundary=0.9):
    return Wan22ExpertSwitch.execute(high, low, boundary).args[0]


def _cond(model, name="positive", **values):
    """A prompt for `model` with the golden image, as WanImageToVideo makes it."""
    data = goldens.load("rcm")
    context = in_comfyui.pad_context(data["i2v.context"])
    image = in_comfyui.image_conditioning(model, data["i2v.y"][..., :8, :16])
    return [[context if name == "positive" else 4 * context.flip(-2), {**image, **values}]]


def _noise(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def _guider(model, positive="positive", cfg=1.0, **values):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(_cond(model, positive, **values), _cond(model, "negative", **values))
    guider.set_cfg(cfg)
    return guider


def _run(model, sigmas=SIGMAS, noise=None, latent=None, callback=None, sampler=None, **options):
    """A run through ComfyUI's guider, without step noise if no `sampler` is given."""
    noise = _noise() if noise is None else noise
    latent = torch.zeros_like(noise) if latent is None else latent
    sampler = sampler or rcm_sampler("ode")
    guider = _guider(model, **options)
    return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True)


def _in_two_runs(high, low, **options):
    """The same without the switch: `high` for the first half of SIGMAS, `low` from there."""
    sampler, states = rcm_sampler("ode"), []
    sample = sampler.sampler_function

    def from_there(model, x, sigmas, **options):
        states.append(sample(model, states[-1] if states else x, sigmas, **options))
        return states[-1]

    sampler.sampler_function = from_there
    _run(high, SIGMAS[:3], sampler=sampler, **options)
    return _run(low, SIGMAS[2:], sampler=sampler, **options)


def _marked(model, name, ran, kind="diffusion_model"):
    """A clone of `model` that appends `name` to `ran` whenever it runs."""

    def note(executor, *args, **kwargs):
        ran.append(name)
        return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(kind, f"test.{name}", note)
    return clone


@pytest.fixture
def loads(monkeypatch):
    """The models of every load that the host is asked for, in order."""
    asked, load = [], management.load_models_gpu

    def recording(models, *args, **kwargs):
        asked.append([patcher.model for patcher in models])
        return load(models, *args, **kwargs)

    monkeypatch.setattr(management, "load_models_gpu", recording)
    return asked


@pytest.fixture
def report(caplog):
    """Returns the report line of the one run since it was called last."""
    caplog.set_level(logging.INFO)

    def take():
        (line,) = [m for m in caplog.messages if "forward pass" in m]
        caplog.clear()
        return line

    return take


def _state(model):
    """All that nodes and samplers may change in a MODEL."""
    wrappers = {kind: list(keys) for kind, keys in model.wrappers.items()}
    callbacks = {kind: list(keys) for kind, keys in model.callbacks.items()}
    hooks = model.hook_mode, model.hook_patches_backup, dict(model.hook_patches)
    patches = list(model.object_patches), list(model.patches), wrappers, callbacks, *hooks
    return copy.deepcopy(model.model_options), *patches, model.model.current_patcher


# The switch itself


def test_one_run_equals_a_run_of_each_expert(high, low):
    out = _run(_switch(high, low))
    assert goldens.relative_error(out, _in_two_runs(high, low)) <= SAME
    for wrong in (_in_two_runs(low, high), _run(high), _run(low)):
        assert goldens.relative_error(out, wrong) > OTHER


def test_the_inputs_stay_as_they_are(high, low):
    before = [_run(model) for model in (high, low)]
    kept = [_state(model) for model in (high, low)]
    _run(_switch(high, low))
    assert [_state(model) for model in (high, low)] == kept
    assert torch.equal(_run(high), before[0])
    assert torch.equal(_run(low), before[1])


def test_the_boundary_itself_is_for_the_high_noise_expert(high, low):
    """0.9 as float32 is a little less than 0.9."""
    ran = []
    model = _switch(_marked(high, "high", ran), _marked(low, "low", ran))
    below = torch.nextafter(torch.tensor(0.9), torch.tensor(0.0)).item()
    _run(model, torch.tensor([0.95, 0.9, below, 0.0]))
    assert ran == ["high", "high", "low"]


@pytest.mark.parametrize(
    ("boundary", "expected"), [(0.0, "hhhh"), (0.5, "hhhh"), (0.86, "hhll"), (1.0, "llll")]
)
def test_other_boundaries(high, low, boundary, expected):
    ran = []
    model = _switch(_marked(high, "h", ran), _marked(low, "l", ran), boundary)
    _run(model)
    assert "".join(ran) == expected


def test_a_sampler_that_goes_up_again_gets_the_high_noise_expert_back(high, low, loads):
    ran = []
    model = _switch(_marked(high, "high", ran), _marked(low, "low", ran))
    _run(model, torch.tensor([0.95, 0.7, 0.93, 0.5, 0.0]))
    assert ran == ["high", "low", "high", "low"]
    assert loads == [[high.model], [low.model]] * 2


def test_a_sampler_with_steps_between_the_sigmas(high, low):
    """Heun and dpm_2 evaluate each step twice, so one step may ask both experts."""
    ran, sigmas = [], torch.tensor([0.95, 0.88, 0.5, 0.0])
    model = _switch(_marked(high, "h", ran), _marked(low, "l", ran))
    assert _run(model, sigmas, sampler=comfy.samplers.sampler_object("heun")).isfinite().all()
    assert "".join(ran) == "hl" + "ll" + "l"


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("sampler", ["euler", "lcm"])
def test_ksampler(high, low, sampler, steps):
    ran, seen = [], []
    model = _switch(_marked(high, 0, ran), _marked(low, 1, ran))
    noise = _noise()[..., :4, :4]
    out = comfy.sample.sample(
        model,
        noise,
        steps,
        1.0,
        sampler,
        "simple",
        _cond(model),
        _cond(model, "negative"),
        torch.zeros_like(noise),
        callback=lambda step, *_: seen.append(step),
        disable_pbar=True,
        seed=3,
    )
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    assert ran == [int(sigma < 0.9) for sigma in sigmas[:-1]]
    assert seen == list(range(steps))
    assert out.isfinite().all()


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("mode", ["sde", "ode"])
def test_sampler_custom_advanced(high, low, mode, steps):
    from comfy_extras import nodes_custom_sampler as nodes

    ran = []
    model = _switch(_marked(high, 0, ran), _marked(low, 1, ran))
    guider = nodes.BasicGuider.execute(model, _cond(model)).args[0]
    noise = nodes.RandomNoise.execute(7).args[0]
    sigmas, latent = rcm_sigmas(steps, 200), {"samples": torch.zeros(1, 16, 3, 4, 4)}
    sampler = rcm_sampler(mode)
    out, denoised = nodes.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args
    assert ran == [int(sigma < 0.9) for sigma in sigmas[:-1]]
    assert out["samples"].shape == denoised["samples"].shape == latent["samples"].shape
    assert out["samples"].isfinite().all()


# Memory


def test_the_low_noise_expert_knows_the_shapes_of_the_latents(high, low):
    """Newer hosts tell them to the model that a run begins with."""
    told = []
    if not hasattr(high.model, "latent_shapes"):
        high.model.latent_shapes = [SHAPE]

    def note(executor, x, timestep, *args):
        told.append(getattr(executor.class_obj.inner_model, "latent_shapes", None))
        return executor(x, timestep, *args)

    low.model.latent_shapes = "those of another run"
    low.add_wrapper_with_key("predict_noise", "test", note)
    _run(_switch(high, low))
    assert told == [high.model.latent_shapes] * 2
    assert [tuple(shape) for shape in told[0]] == [SHAPE]


def test_each_expert_is_loaded_when_its_turn_comes(high, low, loads):
    seen = []
    _run(_switch(high, low), callback=lambda *_: seen.append(len(loads)))
    assert loads == [[high.model], [low.model]]
    assert seen == [1, 1, 2, 2]


def test_an_expert_that_has_no_turn_is_not_loaded(high, low, loads):
    model = _switch(high, low)
    _run(model, SIGMAS[:2])
    assert loads == [[high.model]]
    loads.clear()
    half = _run(high, SIGMAS[:3])
    loads.clear()
    out = _run(model, SIGMAS[2:], torch.zeros(SHAPE), half)
    assert loads == [[low.model]]
    assert goldens.relative_error(out, _run(low, SIGMAS[2:], torch.zeros(SHAPE), half)) <= SAME


@pytest.mark.parametrize("windows", [False, True])
def test_the_host_reserves_for_the_latent(files, monkeypatch, windows):
    """Both times the same: with context windows that is the latent of one window."""
    reserved, load = [], management.load_models_gpu
    model = _switch(_load(files["t2v-quant.pth"]), _load(files["t2v.pth"]))

    def recording(models, memory_required=0, minimum_memory_required=None, **options):
        reserved.append((memory_required, minimum_memory_required))
        load(models, memory_required, minimum_memory_required=minimum_memory_required, **options)

    monkeypatch.setattr(management, "load_models_gpu", recording)
    _run(in_comfyui.context_windows(model, length=5, overlap=1) if windows else model)
    assert reserved[0] == reserved[1]
    required, minimum = reserved[1]
    frames = 2 if windows else 3
    shape = (1, 16, frames, *SHAPE[3:])
    assert minimum == pytest.approx(model.model.memory_required(shape))
    assert required == pytest.approx(model.model.memory_required((2, *shape[1:])))


def test_models_that_an_expert_brings_are_loaded_with_it(high, low, loads):
    events, helper = [], _other(torch.nn.Linear(2, 2))
    helper.add_callback_with_key("on_cleanup", "test", lambda *_: events.append("clean"))
    helper.model_dtype = lambda: torch.float32
    low.set_additional_models("test", [helper])
    _run(_switch(high, low))
    assert loads[0] == [high.model]
    assert sorted(map(id, loads[1])) == sorted(map(id, (low.model, helper.model)))
    assert events == ["clean"]


def test_two_prompts_in_a_row(high, low, loads):
    model = _switch(high, low)
    first = _run(model)
    second = _run(model, positive="other")
    assert goldens.relative_error(second, first) > OTHER
    assert goldens.relative_error(second, _in_two_runs(high, low, positive="other")) <= SAME
    assert torch.equal(_run(model), first)
    assert loads[:4] == [[high.model], [low.model]] * 2


def test_experts_that_are_streamed(high, low, monkeypatch):
    """Where an expert does not fit, the host leaves its weights in RAM and fetches them per use."""
    resident = _run(_switch(high, low))
    for model in (high, low):
        model.detach()
    load = comfy.model_patcher.ModelPatcher.load

    def short_of_memory(self, *args, lowvram_model_memory=0, full_load=True, **options):
        load(self, *args, lowvram_model_memory=1, full_load=False, **options)

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", short_of_memory)
    lora = _with_lora(low)
    with dynamic_vram.full() if in_comfyui.DYNAMIC else contextlib.nullcontext():
        streamed = _run(_switch(high, lora))
    modules = list(low.model.diffusion_model.modules())
    if in_comfyui.DYNAMIC:
        assert {m._v_signature for m in modules if hasattr(m, "_v")} == {None}, "some were kept"
    else:
        assert any(getattr(m, "weight_function", 0) for m in modules), "nothing was streamed"
    for model in (high, lora):
        model.detach()
    monkeypatch.undo()
    assert goldens.relative_error(streamed, _run(_switch(high, lora))) < 5e-3
    assert torch.equal(_run(_switch(high, low)), resident)


# What each expert comes with


def _lora(model, rank=4, strength=0.2):
    """A LoRA on every q of the blocks."""
    generator = torch.Generator().manual_seed(3)
    lora = {}
    for index in range(2):
        for attention in ("self_attn", "cross_attn"):
            key = f"diffusion_model.blocks.{index}.{attention}.q"
            lora[f"{key}.lora_A.weight"] = strength * torch.randn(rank, 256, generator=generator)
            lora[f"{key}.lora_B.weight"] = strength * torch.randn(256, rank, generator=generator)
    return lora


def _with_lora(model):
    return comfy.sd.load_lora_for_models(model, None, _lora(model), 1.0, 0.0)[0]


def _with_zero_ffn(model):
    model = model.clone()
    model.add_object_patch(FFN, lambda x: torch.zeros_like(x))
    return model


def _with_halved_blocks(model):
    model = model.clone()

    def halve(args, extra):
        return {"img": extra["original_block"](args)["img"] / 2}

    model.set_model_patch_replace(halve, "dit", "double_block", 0)
    return model


def _with_dense_attention(model):
    return patch_attention(model, SLASettings("dense"))


def _with_scaled_output(model):
    model = model.clone()

    def scale(apply_model, inputs):
        return 0.9 * apply_model(inputs["input"], inputs["timestep"], **inputs["c"])

    model.set_model_unet_function_wrapper(scale)
    return model


def _with_scaled_guidance(model):
    model = model.clone()
    model.set_model_sampler_post_cfg_function(lambda args: 0.9 * args["denoised"])
    return model


def _with_lazy_cache(model):
    """ComfyUI's LazyCache, which wraps the run and each prediction: here it skips every other."""
    from comfy_extras.nodes_easycache import LazyCacheNode

    return LazyCacheNode.execute(model, 100.0, 0.0, 1.0, False).args[0]


CHANGES = {
    "lora": _with_lora,
    "object patch": _with_zero_ffn,
    "block patch": _with_halved_blocks,
    "dense attention": _with_dense_attention,
    "model wrapper": _with_scaled_output,
    "guidance": _with_scaled_guidance,
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_expert_keeps_its_own(high, low, change):
    plain = _run(_switch(high, low))
    for experts in ((CHANGES[change](high), low), (high, CHANGES[change](low))):
        out = _run(_switch(*experts))
        assert goldens.relative_error(out, _in_two_runs(*experts)) <= SAME
        assert goldens.relative_error(out, plain) > OTHER
    assert torch.equal(_run(_switch(high, low)), plain)


@pytest.mark.parametrize("change", CHANGES)
def test_what_comes_behind_the_switch_reaches_the_high_noise_expert(high, low, change):
    if change == "guidance":
        pytest.skip("goes for the whole run, see the next test")
    out = _run(CHANGES[change](_switch(high, low)))
    assert torch.equal(out, _run(_switch(CHANGES[change](high), low)))


def test_guidance_behind_the_switch_reaches_both(high, low):
    changed = _with_scaled_guidance(high), _with_scaled_guidance(low)
    out = _run(_with_scaled_guidance(_switch(high, low)))
    assert goldens.relative_error(out, _in_two_runs(*changed)) <= SAME
    once = _run(_switch(changed[0], low))
    assert goldens.relative_error(out, once) > OTHER
    # `low` keeps its own besides.
    twice = _run(_with_scaled_guidance(_switch(high, changed[1])))
    expected = _in_two_runs(changed[0], _with_scaled_guidance(changed[1]))
    assert goldens.relative_error(twice, expected) <= SAME


def _with_cfg_function(model, strength):
    model = model.clone()

    def guide(args):
        return args["uncond"] + strength * (args["cond"] - args["uncond"])

    model.set_model_sampler_cfg_function(guide)
    return model


def test_a_cfg_function_behind_the_switch_reaches_both(high, low):
    model = _with_cfg_function(_switch(high, _with_cfg_function(low, 3.0)), 2.0)
    expected = _in_two_runs(_with_cfg_function(high, 2.0), _with_cfg_function(low, 2.0), cfg=1.5)
    assert goldens.relative_error(_run(model, cfg=1.5), expected) <= SAME
    model = _switch(_with_cfg_function(high, 2.0), _with_cfg_function(low, 3.0))
    expected = _in_two_runs(_with_cfg_function(high, 2.0), _with_cfg_function(low, 3.0), cfg=1.5)
    assert goldens.relative_error(_run(model, cfg=1.5), expected) <= SAME


def test_clones_of_the_switch_run_the_same(high, low):
    model = _switch(high, low)
    out = _run(model)
    for clone in (model.clone(), model.clone().clone()):
        assert torch.equal(_run(clone), out)


@pytest.mark.parametrize("cfg", [2.0, 3.0])
def test_guidance_by_two_prompts(high, low, cfg):
    out = _run(_switch(high, low), cfg=cfg)
    assert goldens.relative_error(out, _in_two_runs(high, low, cfg=cfg)) <= SAME
    assert goldens.relative_error(out, _run(_switch(high, low))) > OTHER


def test_first_steps_are_each_experts_own(high, low, report):
    settings = SLASettings("sla", 0.34, dense_steps=1)
    experts = [patch_attention(model, settings) for model in (high, low)]
    out = _run(_switch(*experts))
    told = report()
    for part in told.split(" | "):
        assert "SLA in 2 of 2 blocks" in part
        assert "dense in blocks 0-1: chosen for the first 1 steps" in part
    assert goldens.relative_error(out, _run(_switch(high, low))) > OTHER
    # The first step of each run on its own is dense too.
    assert goldens.relative_error(out, _in_two_runs(*experts)) <= SAME


def test_wrappers_and_callbacks_of_both_run(high, low):
    events = []
    experts = {"high": high, "low": low}
    for name, model in experts.items():
        for kind in ("outer_sample", "predict_noise", "calc_cond_batch", "apply_model"):
            model = _marked(model, f"{name} {kind}", events, kind)
        for kind in ("on_pre_run", "on_cleanup"):
            note = lambda *_, event=f"{name} {kind}": events.append(event)  # noqa: E731
            model.add_callback_with_key(kind, "test", note)
        experts[name] = model
    _run(_switch(*experts.values()), rcm_sigmas(3, 200))
    step = ("predict_noise", "calc_cond_batch", "apply_model")
    assert events == [
        "high outer_sample",
        "low outer_sample",
        "high on_pre_run",
        *(f"high {kind}" for kind in step * 2),
        "low on_pre_run",
        *(f"low {kind}" for kind in step),
        "high on_cleanup",
        "low on_cleanup",
    ]


@pytest.mark.parametrize("where", ["high", "low", "both", "behind"])
def test_lazy_cache(high, low, where, caplog):
    """It keeps state for a run, so it must meet its own options and nobody else's."""
    caplog.set_level(logging.INFO)
    ran = []
    if where in ("high", "both"):
        high = _with_lazy_cache(high)
    if where in ("low", "both"):
        low = _with_lazy_cache(low)
    model = _switch(_marked(high, "h", ran), _marked(low, "l", ran))
    model = _with_lazy_cache(model) if where == "behind" else model
    assert _run(model, rcm_sigmas(12, 200)).isfinite().all()
    all_high = sum(bool(sigma >= 0.9) for sigma in rcm_sigmas(12, 200)[:-1])
    assert (ran.count("h") < all_high) == (where != "low")
    assert (ran.count("l") < 12 - all_high) == (where in ("low", "both"))


def test_context_windows_behind_the_switch_are_for_both(files):
    ran, high, low = [], _load(files["t2v-quant.pth"]), _load(files["t2v.pth"])
    model = _switch(_marked(high, "h", ran), _marked(low, "l", ran))
    _run(in_comfyui.context_windows(model, length=5, overlap=1))
    windows = len(ran) // 4
    assert windows > 1
    assert "".join(ran) == "h" * 2 * windows + "l" * 2 * windows


def test_a_scheduled_lora_reaches_both(files, tmp_path):
    tensors = torch.load(files["t2v.pth"])
    tensors["head.head.weight"] *= 1.5
    torch.save(tensors, tmp_path / "other.pth")
    high, low = _load(files["t2v.pth"]), _load(str(tmp_path / "other.pth"))

    def hooks():
        return {"hooks": comfy.hooks.create_hook_lora(_lora(high), 1.0, 0.0)}

    def hookable():
        asked.append(delegate())
        return asked[-1]

    def note_mode(executor, *args, **kwargs):
        modes.update(model.hook_mode for model in asked)
        return executor(*args, **kwargs)

    asked, modes = [], set()
    delegate = low.get_non_dynamic_delegate if in_comfyui.DYNAMIC else lambda: low
    low.get_non_dynamic_delegate = hookable  # newer hosts want it for hooks
    low.add_wrapper_with_key("diffusion_model", "test", note_mode)
    plain, kept = _run(_switch(high, low)), _state(low)
    assert torch.equal(_run(_switch(high, low)), plain)
    assert asked == []
    out = _run(_switch(high, low), **hooks())
    assert len(asked) == 1
    assert modes == {comfy.hooks.EnumHookMode.MinVram}  # as the host does with one set of hooks
    assert _state(low) == kept
    assert goldens.relative_error(out, _in_two_runs(high, low, **hooks())) <= SAME
    assert goldens.relative_error(out, plain) > OTHER
    assert torch.equal(_run(_switch(high, low)), plain)


# Other models than image to video


def test_text_to_video_experts(files):
    high, low = _load(files["t2v-quant.pth"]), _load(files["t2v.pth"], "dense")
    out = _run(_switch(high, low, 0.875))
    assert goldens.relative_error(out, _in_two_runs(high, low)) <= SAME


# The report


def test_one_line_tells_of_both_experts(high, low, report):
    _run(_switch(high, _with_dense_attention(low)))
    line = report()
    first, second = line.removeprefix("TurboDiffusion: ").split(" | ")
    assert first.startswith("high-noise expert: 2 forward passes; SLA in 2 of 2 blocks; sla top-k")
    assert second.startswith("low-noise expert: 2 forward passes; SLA in 0 of 2 blocks; dense in")
    assert all("in 20 linears" in part for part in (first, second))


def test_an_expert_without_a_turn_is_not_told_of(high, low, report):
    _run(_switch(high, low), SIGMAS[:2])
    assert report().startswith("TurboDiffusion: high-noise expert: 1 forward pass")
    _run(_switch(high, low), SIGMAS[2:])
    line = report()
    assert line.startswith("TurboDiffusion: low-noise expert: 2 forward passes")
    assert "high-noise" not in line


def test_an_expert_of_another_loader_is_told_of(files, report):
    tensors = dict(read_checkpoint(files["t2v.pth"]).tensors)
    options = {"dtype": torch.bfloat16}
    stock = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options)
    turbo = _load(files["t2v-quant.pth"])
    _run(_switch(turbo, stock))
    assert report().endswith(" | low-noise expert: runs without TurboDiffusion")
    _run(_switch(stock, turbo))
    line = report()
    assert line.startswith("TurboDiffusion: high-noise expert: runs without TurboDiffusion | ")
    assert "low-noise expert: 2 forward passes; SLA in 2 of 2 blocks" in line


# Cancel


def _cancel(*args, **kwargs):
    raise management.InterruptProcessingException


def _cancel_in_callback(step):
    def callback(now, *_):
        if now == step:
            management.interrupt_current_processing()

    return lambda high, low, monkeypatch: callback


def _cancel_in_forward(which):
    def arrange(high, low, monkeypatch):
        model = {"high": high, "low": low}[which]
        model.add_wrapper_with_key("diffusion_model", "test", _cancel)

    return arrange


def _cancel_while_loading(high, low, monkeypatch):
    load = management.load_models_gpu

    def loading(models, *args, **kwargs):
        load(models, *args, **kwargs)
        if low.model in [patcher.model for patcher in models]:
            _cancel()

    monkeypatch.setattr(management, "load_models_gpu", loading)


MOMENTS = {
    **{f"after step {step}": _cancel_in_callback(step) for step in range(3)},
    "in a high-noise step": _cancel_in_forward("high"),
    "in a low-noise step": _cancel_in_forward("low"),
    "while low is loaded": _cancel_while_loading,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_cancel_leaves_everything_clean(high, low, monkeypatch, moment):
    undisturbed = _run(_switch(high, low))
    experts = high.clone(), low.clone()
    callback = MOMENTS[moment](*experts, monkeypatch)
    model = _switch(*experts)
    guider, sampler, noise = _guider(model), rcm_sampler("ode"), _noise()
    kept = [_state(patcher) for patcher in (model, *experts)]
    with pytest.raises(management.InterruptProcessingException):
        guider.sample(noise, 0 * noise, sampler, SIGMAS, callback=callback, disable_pbar=True)
    monkeypatch.undo()
    assert not management.processing_interrupted()
    assert guider.model_patcher is model
    assert guider.model_options is model.model_options
    assert guider.inner_model is high.model
    assert [_state(patcher) for patcher in (model, *experts)] == kept
    assert torch.equal(_run(_switch(high, low)), undisturbed)


# Bad input


def _other(diffusion_model):
    """A MODEL around any module."""
    model = torch.nn.Module()
    model.diffusion_model = diffusion_model
    return comfy.model_patcher.ModelPatcher(model, in_comfyui.DEVICE, torch.device("cpu"))


def _tiny(tmp_path, **sizes):
    torch.save(tiny_models.i2v_checkpoint(seed=5, **sizes), tmp_path / "tiny.pth")
    return load_turbo_model(str(tmp_path / "tiny.pth"))


@pytest.mark.parametrize("missing", ["model_high", "model_low"])
def test_one_expert_missing(monkeypatch, missing):
    import execution

    import nodes

    model = {"required": {"model": ("MODEL",)}}
    loader = {"INPUT_TYPES": lambda: {"required": {}}, "RETURN_TYPES": ("MODEL",), "FUNCTION": "f"}
    output = {"INPUT_TYPES": lambda: model, "RETURN_TYPES": (), "OUTPUT_NODE": True}
    classes = {
        "Loader": type("Loader", (), loader),
        "Output": type("Output", (), {**output, "FUNCTION": "f"}),
        "Wan22ExpertSwitch": Wan22ExpertSwitch,
    }
    for name, kind in classes.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    inputs = {"model_high": ["load", 0], "model_low": ["load", 0], "boundary": 0.9}
    del inputs[missing]
    prompt = {
        "load": {"class_type": "Loader", "inputs": {}},
        "switch": {"class_type": "Wan22ExpertSwitch", "inputs": inputs},
        "out": {"class_type": "Output", "inputs": {"model": ["switch", 0]}},
    }
    valid, _, _, wrong = asyncio.run(execution.validate_prompt("id", prompt, None))
    assert not valid
    (error,) = wrong["switch"]["errors"]
    assert error["message"] == "Required input is missing"
    assert error["details"] == missing


@pytest.mark.parametrize("swapped", [False, True])
def test_not_a_wan_model(high, swapped):
    pair = [high, _other(torch.nn.Linear(2, 2))]
    name = "model_high" if swapped else "model_low"
    told = f"{name} must be a Wan MODEL, got Linear.*Connect an expert of Wan 2.2"
    with pytest.raises(ValueError, match=told):
        _switch(*(reversed(pair) if swapped else pair))


def test_the_same_model_twice(high, low, files):
    told = "must be two experts, got the same model twice.*Load the high-noise file for one and"
    again = _load(files["i2v_high-quant.pth"])
    twins = {
        "itself": high,
        "a clone": high.clone(),
        "a clone with a LoRA": _with_lora(high),
        "the same file again": again,
        "the same file again with a LoRA": _with_lora(again),
    }
    for twin in twins.values():
        with pytest.raises(ValueError, match=told):
            _switch(high, twin)


def test_experts_of_different_models(high, tmp_path, files):
    told = "must be experts of one model, got {}.*Load the high-noise and the low-noise file of the"
    with pytest.raises(ValueError, match=told.format("36 and 16 input channels")):
        _switch(high, _load(files["t2v-quant.pth"]))
    with pytest.raises(ValueError, match=told.format("2 and 3 blocks")):
        _switch(high, _tiny(tmp_path, layers=3))
    shapes = "256 and 384 channels, 512 and 640 feed-forward channels, 2 and 3 attention heads"
    with pytest.raises(ValueError, match=told.format(shapes)):
        _switch(high, _tiny(tmp_path, dim=384, ffn=640))


def test_another_kind_of_wan(high):
    wan = comfy.ldm.wan.model
    sizes = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "in_dim": 36}
    sizes |= {"operations": comfy.ops.manual_cast, "device": "meta"}
    clip = wan.WanModel(**sizes, model_type="i2v")
    with pytest.raises(ValueError, match="got t2v and i2v model type"):
        _switch(high, _other(clip))
    vace = wan.VaceWanModel(**sizes, model_type="t2v", vace_layers=1, vace_in_dim=96)
    with pytest.raises(ValueError, match="got a WanModel and a VaceWanModel"):
        _switch(high, _other(vace))


def test_an_expert_that_is_a_switch_itself(high, low):
    told = "{} must be one expert, got the MODEL of another Wan22ExpertSwitch.*Connect what a"
    model = _switch(high, low)
    with pytest.raises(ValueError, match=told.format("model_high")):
        _switch(model, low)
    with pytest.raises(ValueError, match=told.format("model_low")):
        _switch(high, model.clone())


@pytest.mark.parametrize("boundary", [-0.1, 1.1, float("nan")])
def test_a_boundary_that_is_no_sigma(high, low, boundary):
    told = f"boundary is a sigma from 0 to 1, got {boundary}: use 0.9 for image to video"
    with pytest.raises(ValueError, match=told):
        _switch(high, low, boundary)


def test_a_failed_switch_leaves_the_inputs(high, low):
    out = _run(high)
    with pytest.raises(ValueError):
        _switch(high, high.clone())
    assert torch.equal(_run(high), out)
