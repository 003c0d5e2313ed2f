"""TurboLoraLoader: LoRAs that the host skips reach it under its own names."""

import json
import logging
from pathlib import Path

import goldens
import in_comfyui
import model_folders
import pytest
import torch
from in_comfyui import comfy
from safetensors.torch import save_file
from turbodiffusion_pack.nodes.lora import TurboLoraLoader
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

NAME = "diffusion_model.blocks.0.self_attn.q"
KEY = "t2v.ragged"
SPELLINGS = {
    "diffusers": "transformer.blocks.0.attn1.to_q.lora_{}.weight",
    "PEFT": "base_model.model.blocks.0.self_attn.q.lora_{}.weight",
    "bare": "blocks.0.self_attn.q.lora_{}.default.weight",
    "pipe": "pipe.dit.blocks.0.self_attn.q.lora_{}.weight",
    "LyCORIS": "lycoris_blocks_0_self_attn_q.lora_{}.weight",
    "mixed kohya": "lora_unet_blocks_0.self_attn.q.lora_{}.weight",
}


@pytest.fixture(scope="module")
def model(paths):
    return patch_attention(load_turbo_model(paths[0]), SLASettings("dense"))


@pytest.fixture(scope="module")
def load(model, tmp_path_factory):
    """Returns a function that writes tensors to a LoRA file and loads it with the node."""
    folder = tmp_path_factory.mktemp("loras")

    def run(tensors, strength=1.0, name="tiny.safetensors", metadata=None):
        save_file(tensors, folder / name, metadata)
        return TurboLoraLoader.execute(model, name, strength)

    with model_folders.listed("loras", folder):
        yield run


def _lora(spelling=f"{NAME}.lora_{{}}.weight", dim=256):
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator) for shape in ((4, dim), (dim, 4)))
    return {spelling.format("A"): down, spelling.format("B"): up}


def _weights(patcher):
    """The one patch of `patcher`: its key, strength and tensors."""
    ((key, ((strength, adapter, *_),)),) = patcher.patches.items()
    return key, strength, adapter.weights


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_it_is_the_patch_that_the_host_makes_of_its_own_spelling(load, model, caplog, spelling):
    expected = comfy.sd.load_lora_for_models(model, None, _lora(), 0.5, 0)[0]
    caplog.set_level(logging.INFO)
    patched, report = load(_lora(SPELLINGS[spelling]), 0.5).args
    key, strength, (up, down, alpha, *_) = _weights(patched)
    assert (key, strength) == (f"{NAME}.weight", 0.5) == _weights(expected)[:2]
    assert torch.equal(up, _weights(expected)[2][0])
    assert torch.equal(down, _weights(expected)[2][1])
    assert alpha is None
    assert "1 layer changed, rank 4, alpha / rank 1" in report
    assert not [m for m in caplog.messages if "not loaded" in m]
    assert not model.patches


def test_the_output_is_that_of_the_hosts_own_loader(load, model):
    data = goldens.load("forward")
    x, context = data[f"{KEY}.x"][..., :1, :, :], data[f"{KEY}.context"]
    stock = comfy.sd.load_lora_for_models(model, None, _lora(), 0.2, 0)[0]
    expected = in_comfyui.velocity(stock, x, context, 987.5)
    patched = load(_lora(SPELLINGS["diffusers"]), 0.2).args[0]
    assert torch.equal(in_comfyui.velocity(patched, x, context, 987.5), expected)


def test_strength_0_leaves_it_as_it_is(load, model):
    patched, report = load(_lora(), 0.0).args
    assert patched is model
    assert "strength 0\n" in report


def test_the_alpha_of_a_header_scales_it(load):
    settings = json.dumps({"transformer.lora_alpha": 8})
    metadata = {"lora_adapter_metadata": settings}
    patched, report = load(_lora(SPELLINGS["diffusers"]), metadata=metadata).args
    assert _weights(patched)[2][2] == 8
    assert "alpha / rank 2" in report


def test_what_did_not_match_is_told_on_the_node(load):
    lora = {**_lora(), "lora_te_text_model.alpha": torch.tensor(4.0)}
    out = load(lora)
    assert out.ui.as_dict() == {"text": (out.args[1],)}
    first, *_, last = out.args[1].splitlines()
    assert first == "tiny.safetensors, strength 1"
    assert last == "1 tensor without a place in this model: lora_te_text_model.alpha"


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        (_lora(dim=512), r"is \[256, 256\], the LoRA is for \[512, 512\]"),
        (_lora("transformer_blocks.0.attn.to_q.lora_{}.weight"), "2 tensors without a place"),
    ],
)
def test_a_lora_of_which_nothing_fits_is_refused(load, lora, told):
    with pytest.raises(
        ValueError, match=rf"^tiny\.safetensors has no LoRA for this MODEL .*{told}"
    ):
        load(lora)


def test_a_second_distillation_is_remarked_on(load):
    remark = "by its name it distills to few steps"
    assert remark in load(_lora(), name="wan_lightx2v_rank32.safetensors").args[1]
    assert remark not in load(_lora(), name="style.safetensors").args[1]


def test_a_broken_file_is_named(load, model):
    import folder_paths

    load(_lora(), name="cut.safetensors")
    file = Path(folder_paths.get_full_path("loras", "cut.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"^cut\.safetensors: is truncated") as caught:
        TurboLoraLoader.execute(model, "cut.safetensors", 1.0)
    assert caught.type is ValueError
