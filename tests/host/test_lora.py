"""ComfyUI's own LoraLoaderModelOnly on INT8 MODELs: the maths, the way back, the wrong LoRA."""

import logging

import goldens
import in_comfyui
import model_folders
import pytest
import torch
from in_comfyui import comfy
from safetensors.torch import save_file
from turbodiffusion_pack.nodes.quantize import W8A8Quantize
from turbodiffusion_pack.turbo_core.host.int8_tensor import is_int8, unpack
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.operations import Linear
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

BOUND = 1e-2
KEY = "t2v.ragged"
PATCHED = (".self_attn.q", ".cross_attn.v", ".ffn.0", ".ffn.2")


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """Returns a function that writes a LoRA to a file and applies it with the stock node."""
    import nodes

    folder = tmp_path_factory.mktemp("loras")

    def load(model, tensors, strength=1.0):
        save_file(tensors, folder / "tiny.safetensors")
        node = nodes.LoraLoaderModelOnly()
        return node.load_lora_model_only(model, "tiny.safetensors", strength)[0]

    with model_folders.listed("loras", folder):
        yield load


@pytest.fixture(scope="module", params=["TurboLoader fast", "TurboLoader exact", "W8A8Quantize"])
def model(request, paths):
    """An INT8 MODEL with dense attention, whose output moves smoothly with its weights."""
    source, _, granularity = request.param.partition(" ")
    if source == "TurboLoader":
        loaded = load_turbo_model(paths[0], granularity)
    else:
        loaded = load_turbo_model(paths[1])
        loaded = W8A8Quantize.execute(loaded, "fast", False).args[0]
    return patch_attention(loaded, SLASettings("dense"))


def _linears(model):
    """The INT8 Linears by their names."""
    modules = model.model.diffusion_model.named_modules()
    return {name: m for name, m in modules if isinstance(m, Linear) and is_int8(m.weight)}


def _lora(model, rank=4, size=0.11):
    """A LoRA on some Linears of every block, under ComfyUI's key names, with an alpha."""
    generator, lora = torch.Generator().manual_seed(3), {}
    for name, linear in _linears(model).items():
        if name.endswith(PATCHED):
            key = f"diffusion_model.{name}"
            down, up = (rank, linear.in_features), (linear.out_features, rank)
            lora[f"{key}.lora_A.weight"] = size * torch.randn(down, generator=generator)
            lora[f"{key}.lora_B.weight"] = size * torch.randn(up, generator=generator)
            lora[f"{key}.alpha"] = torch.tensor(rank / 2)
    return lora


def _weights(model):
    """Copies of the integers and scales, on the CPU wherever the host keeps them now."""
    return {
        name: [part.to("cpu", copy=True) for part in unpack(linear.weight)]
        for name, linear in _linears(model).items()
    }


def _same_weights(model, weights):
    return all(all(map(torch.equal, pair, weights[n])) for n, pair in _weights(model).items())


def _forward(model):
    data = goldens.load("forward")
    return in_comfyui.velocity(model, data[f"{KEY}.x"], data[f"{KEY}.context"], 987.5)


@pytest.fixture
def predicted(paths):
    """Returns what float weights give: those of `model` dequantized, and `lora` added."""

    def run(model, lora, strength=1.0):
        comfy.model_management.unload_all_models()  # takes LoRAs out of the weights
        twin = load_turbo_model(paths[0])
        twin = patch_attention(twin, SLASettings("dense"))
        into = _linears(twin)
        for name, linear in _linears(model).items():
            weight, key = linear.weight.dequantize().float().cpu(), f"diffusion_model.{name}"
            if f"{key}.alpha" in lora:
                up, down = lora[f"{key}.lora_B.weight"], lora[f"{key}.lora_A.weight"]
                weight += strength * lora[f"{key}.alpha"] / len(down) * up @ down
            into[name].assign(weight)
        return _forward(twin)

    return run


@pytest.mark.parametrize("strength", [1.0, -0.8])
def test_a_lora_does_what_float_weights_predict(model, loader, predicted, strength):
    before, lora = _forward(model), _lora(model)
    out = _forward(loader(model, lora, strength))
    expected = predicted(model, lora, strength)
    assert goldens.relative_error(out, expected) <= BOUND
    assert goldens.relative_error(before, expected) > 2 * BOUND, "the LoRA matters"
    assert goldens.relative_error(before, predicted(model, {})) <= BOUND
    wrong = predicted(model, lora, strength / 2)
    assert goldens.relative_error(out, wrong) > BOUND


def test_unloading_restores_it_bit_for_bit(model, loader):
    before = _forward(model)
    weights = _weights(model)
    patched = loader(model, _lora(model))
    assert goldens.relative_error(_forward(patched), before) > BOUND
    now = _weights(model)
    changed = {name for name, (q, _) in now.items() if not torch.equal(q, weights[name][0])}
    # With dynamic VRAM the host adds a LoRA to a copy.
    expected = {n for n in weights if n.endswith(PATCHED) and not in_comfyui.DYNAMIC}
    assert changed == expected
    assert torch.equal(_forward(model), before)
    assert _same_weights(model, weights)


def test_two_loras_add_up(model, loader, predicted):
    lora = _lora(model)
    twice = loader(loader(model, lora, 0.75), lora, 0.25)
    assert goldens.relative_error(_forward(twice), predicted(model, lora)) <= BOUND


# Scheduled LoRAs, as Create Hook LoRA makes them


def _hook(lora, strength=1.0):
    return comfy.hooks.create_hook_lora(lora, strength, 0.0)


def _sample(model, positive=None, negative=None):
    """Two steps through ComfyUI's guider, each prompt with its hooks if it has some."""
    guider = comfy.samplers.CFGGuider(model)
    context = in_comfyui.pad_context(goldens.load("rcm")["t2v.context"])
    conds = [[[context, {"hooks": hooks} if hooks else {}]] for hooks in (positive, negative)]
    guider.set_conds(*conds)
    guider.set_cfg(2.0)
    noise = torch.randn(1, 16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([0.99, 0.9, 0.0])
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)


def test_a_scheduled_lora_is_taken_out_bit_for_bit(model, loader):
    before, weights, lora = _sample(model), _weights(model), _lora(model)
    hooked = _sample(model, _hook(lora), _hook(lora))
    assert goldens.relative_error(hooked, _sample(loader(model, lora))) <= BOUND
    assert goldens.relative_error(hooked, before) > 2 * BOUND
    assert torch.equal(_sample(model), before)
    assert _same_weights(model, weights)
    assert torch.equal(_sample(model, _hook(lora), _hook(lora)), hooked)


@pytest.mark.parametrize("negative", [None, -0.8])
def test_prompts_with_other_loras_take_turns(model, negative):
    """The host keeps patched weights, in float, and copies them in when it is their turn."""
    weights, lora = _weights(model), _lora(model)
    hooks = _hook(lora), None if negative is None else _hook(lora, negative)
    patched_anew = model.clone()
    patched_anew.set_hook_mode(comfy.hooks.EnumHookMode.MinVram)
    expected = _sample(patched_anew, *hooks)
    assert torch.equal(_sample(model, *hooks), expected)
    assert goldens.relative_error(_sample(model, hooks[0], hooks[0]), expected) > BOUND
    model.detach()
    assert _same_weights(model, weights)


def test_a_scheduled_lora_on_streamed_weights_and_another_lora(model, loader):
    weights, lora = _weights(model), _lora(model)
    hooks = _hook(lora, 0.5)
    patched = in_comfyui.hookable(loader(model, lora, 0.5))
    patched.patch_model(device_to=in_comfyui.DEVICE, lowvram_model_memory=1)
    resident = _weights(patched)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    patched.register_all_hook_patches(hooks, target)
    for _ in range(2):
        patched.patch_hooks(hooks)
        assert not _same_weights(patched, resident)
        patched.patch_hooks(None)
        assert _same_weights(patched, resident)
    patched.detach()
    assert _same_weights(model, weights)


# A LoRA for another model


def _messages(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_no_key_of_another_architectures_lora_is_loaded(model, loader, caplog):
    before = _forward(model)
    key = "transformer.double_blocks.0.img_attn.qkv"
    lora = {f"{key}.lora_A.weight": torch.ones(4, 8), f"{key}.lora_B.weight": torch.ones(8, 4)}
    patched = loader(model, lora)
    assert {f"lora key not loaded: {name}" for name in lora} <= set(_messages(caplog))
    assert not patched.patches
    assert torch.equal(_forward(patched), before)


def test_a_lora_for_another_size_leaves_the_weight_as_it_is(model, loader, caplog):
    """ComfyUI names the weight and goes on without that part of the LoRA."""
    before, name = _forward(model), "diffusion_model.blocks.1.self_attn.q"
    down, up = torch.ones(4, 512), torch.ones(512, 4)
    lora = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    out = _forward(loader(model, lora))
    (told,) = [m for m in _messages(caplog) if "ERROR" in m]
    assert f"{name}.weight" in told
    # The weight is quantized anew; bf16, as on a GPU, rounds the output besides.
    assert goldens.relative_error(out, before) < (5e-3 if torch.cuda.is_available() else 1e-3)
    assert torch.equal(_forward(model), before)
