"""LoRAs in every spelling that trainers write, read as one."""

import json
import math
import re

import pytest
import torch
from layouts import SGLANG
from tiny_models import stock_checkpoint
from turbodiffusion_pack.turbo_core.lora import (
    describe,
    is_distillation,
    peft_settings,
    read_lora,
)

RANK = 4
SHAPES = {name: tuple(tensor.shape) for name, tensor in stock_checkpoint().items()}
LINEARS = [
    *(f"blocks.{i}.{a}_attn.{p}" for i in (0, 1) for a in ("self", "cross") for p in "qkvo"),
    *(f"blocks.{i}.ffn.{j}" for i in (0, 1) for j in (0, 2)),
    *("patch_embedding", "text_embedding.2", "time_projection.1", "head.head"),
]


def native(alpha: float | None = None) -> dict[str, torch.Tensor]:
    """A random LoRA under ComfyUI's names."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for module in LINEARS:
        rows, *columns = SHAPES[f"{module}.weight"]
        down, up = (RANK, math.prod(columns)), (rows, RANK)
        name = f"diffusion_model.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(down, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(up, generator=generator)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def diffusers(name: str) -> str:
    """diffusion_model.blocks.0.self_attn.q.x as transformer.blocks.0.attn1.to_q.x."""
    for ours, theirs in SGLANG:
        name = re.sub(ours, theirs, name, count=1)
    return name.replace("diffusion_model.", "transformer.")


def kohya(name: str, prefix: str = "lora_unet_") -> str:
    """diffusion_model.blocks.0.ffn.0.lora_A.weight as lora_unet_blocks_0_ffn_0.lora_down.weight."""
    module, ending = re.fullmatch(r"diffusion_model\.(.+?)(\.lora_.*|\.alpha)", name).groups()
    ending = ending.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
    return f"{prefix}{module.replace('.', '_')}{ending}"


SPELLINGS = {
    "ComfyUI": lambda name: name,
    "ComfyUI, down and up": lambda n: n.replace("ora_A", "ora_down").replace("ora_B", "ora_up"),
    "diffusers": diffusers,
    "PEFT": lambda n: n.replace("diffusion_model.", "base_model.model."),
    "PEFT with an adapter's name": lambda n: re.sub(
        r"\.(lora_.)\.", r".\1.style.", n.replace("diffusion_model.", "base_model.model.")
    ),
    "PEFT of diffusers": lambda n: diffusers(n).replace("transformer.", "base_model.model."),
    "bare": lambda n: n.replace("diffusion_model.", ""),
    "bare with default": lambda n: n.replace("diffusion_model.", "").replace(
        ".weight", ".default.weight"
    ),
    "DiffSynth's pipe": lambda n: n.replace("diffusion_model.", "pipe.dit."),
    "kohya": kohya,
    "Wan-Fun": lambda n: kohya(n, "lora_unet__"),
    "LyCORIS": lambda n: kohya(n, "lycoris_"),
    "LyCORIS of diffusers": lambda n: kohya(
        diffusers(n).replace("transformer.", "diffusion_model."), "lycoris_"
    ),
    "mixed kohya": lambda n: n.replace("diffusion_model.blocks.", "lora_unet_blocks_").replace(
        "diffusion_model.", "lora_unet_"
    ),
    "old diffusers": lambda n: (
        diffusers(n).replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
    ),
}


def by_module(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, halves of a LoRA under one of the two names that ComfyUI has for them."""
    one_name = {n: n.replace("lora_down", "lora_A").replace("lora_up", "lora_B") for n in tensors}
    return {one_name[name]: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_lora_in_all_spellings(spelling, alpha):
    expected = native(alpha)
    file = {SPELLINGS[spelling](name): tensor for name, tensor in expected.items()}
    lora = read_lora(file, SHAPES)
    found = by_module(lora.tensors)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (lora.unmatched, lora.misfits) == ([], {})
    assert sorted(lora.modules) == sorted(LINEARS)
    assert (lora.ranks, lora.scales) == ({RANK}, {1.0 if alpha is None else alpha / RANK})
    changed, spelled = describe(lora)
    assert changed.startswith(f"{len(LINEARS)} layers changed, rank 4, alpha / rank ")
    assert spelled == f"spelling: {next(iter(file))} is blocks.0.self_attn.q"


def test_differences_of_norms_biases_and_modulation():
    file = {
        "diffusion_model.blocks.0.diff_m": torch.ones(1, 6, 256),
        "diffusion_model.head.diff_m": torch.ones(1, 2, 256),
        "diffusion_model.blocks.1.self_attn.norm_q.diff": torch.ones(256),
        "transformer.blocks.1.attn2.to_k.diff_b": torch.ones(256),
        "blocks.1.norm3.diff_b": torch.ones(256),
    }
    lora = read_lora(file, SHAPES)
    assert list(lora.tensors) == [
        "diffusion_model.blocks.0.modulation.diff",
        "diffusion_model.head.modulation.diff",
        "diffusion_model.blocks.1.self_attn.norm_q.diff",
        "diffusion_model.blocks.1.cross_attn.k.diff_b",
        "diffusion_model.blocks.1.norm3.diff_b",
    ]
    assert describe(lora)[0] == "5 layers changed"


@pytest.mark.parametrize("part", ["hada_w1_a", "lokr_w1", "lokr_w2_b", "oft_blocks", "a1.weight"])
def test_other_kinds_of_adapters_keep_their_parts(part):
    lora = read_lora({f"lycoris_blocks_0_ffn_0.{part}": torch.ones(2, 2)}, SHAPES)
    assert list(lora.tensors) == [f"diffusion_model.blocks.0.ffn.0.{part}"]


def test_the_image_branch_of_wan_2_1():
    shapes = {**SHAPES, "blocks.0.cross_attn.k_img.weight": (256, 256)}
    shapes["img_emb.proj.1.weight"] = (1280, 1280)
    file = {
        "transformer.blocks.0.attn2.add_k_proj.diff": torch.ones(256, 256),
        "transformer.condition_embedder.image_embedder.ff.net.0.proj.diff_b": torch.ones(1280),
    }
    lora = read_lora(file, shapes)
    assert lora.modules == ["blocks.0.cross_attn.k_img", "img_emb.proj.1"]
    assert read_lora(file, SHAPES).unmatched == list(file)


def test_what_has_no_place_is_told():
    file = {
        **native(),
        "text_encoders.layer.0.lora_A.weight": torch.ones(4, 8),
        "diffusion_model.blocks.7.ffn.0.lora_A.weight": torch.ones(4, 256),
        "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(4, 256),
        "step": torch.ones(1),
    }
    lora = read_lora(file, SHAPES)
    assert lora.unmatched == list(file)[-4:]
    assert "4 tensors without a place in this model: text_encoders.layer.0" in describe(lora)[-1]


def test_the_second_expert_of_a_file_of_both_is_left_out():
    name = "transformer.blocks.0.attn1.to_q.diff"
    second = name.replace("transformer.", "transformer_2.")
    both = {second: torch.zeros(256, 256), name: torch.ones(256, 256)}
    lora = read_lora(both, SHAPES)
    assert torch.equal(lora.tensors["diffusion_model.blocks.0.self_attn.q.diff"], both[name])
    assert lora.unmatched == [second]
    assert read_lora({second: both[second]}, SHAPES).modules == ["blocks.0.self_attn.q"]


def test_a_lora_of_another_model_size():
    name = "blocks.0.self_attn.q"
    halves = {"lora_A": torch.ones(4, 5120), "lora_B": torch.ones(5120, 4)}
    file = {f"{name}.{half}.weight": tensor for half, tensor in halves.items()}
    lora = read_lora(file, SHAPES)
    assert lora.tensors == {}
    assert lora.misfits == {name: "is [256, 256], the LoRA is for [5120, 5120]"}


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_A.weight": torch.ones(4, 256)},
        {"lora_B.weight": torch.ones(256, 4)},
        {"lora_A.weight": torch.ones(()), "lora_B.weight": torch.ones(256, 4)},
        {"lora_A.weight": torch.ones(0, 256), "lora_B.weight": torch.ones(256, 0)},
        {"lora_A.weight": torch.ones(4, 256), "alpha": torch.ones(3)},
        {"lora_A.weight": torch.ones(4, 256), "lora_B.weight": torch.ones(256, 8)},
        {"diff": torch.ones(256, 128)},
        {"alpha": torch.tensor(4.0), "dora_scale": torch.ones(256, 1)},
    ],
)
def test_halves_and_nonsense_are_left_out(parts):
    file = {f"blocks.0.self_attn.q.{part}": tensor for part, tensor in parts.items()}
    lora = read_lora(file, SHAPES)
    assert lora.tensors == {}
    assert list(lora.misfits) == ["blocks.0.self_attn.q"]


def test_alpha_out_of_pefts_settings():
    """alpha / rank, or alpha / sqrt(rank) of a rank-stabilised LoRA (arXiv 2312.03732)."""
    for rslora, scale in ((False, 2.0), (True, 4.0)):
        settings = {"transformer.lora_alpha": 8, "transformer.use_rslora": rslora}
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
        lora = read_lora(native(), SHAPES, peft_settings(metadata))
        assert lora.scales == {scale}
        assert lora.tensors["diffusion_model.head.head.alpha"].item() == scale * RANK
    own = read_lora(native(alpha=2.0), SHAPES, peft_settings(metadata))
    assert own.scales == {0.5}, "the file's own alpha counts"


@pytest.mark.parametrize("header", ["", "[", "[1]", "3", "[" * 100_000, '{"lora_alpha": "x"}'])
def test_a_header_of_nonsense(header):
    settings = peft_settings({"lora_adapter_metadata": header})
    assert read_lora(native(), SHAPES, settings).scales == {1.0}
    assert peft_settings(None) == peft_settings({}) == {}


def test_pefts_magnitudes_become_comfyuis():
    name = "base_model.model.blocks.0.self_attn.q"
    halves = {"lora_A.weight": torch.ones(4, 256), "lora_B.weight": torch.ones(256, 4)}
    file = {f"{name}.{half}": tensor for half, tensor in halves.items()}
    lora = read_lora({**file, f"{name}.lora_magnitude_vector": torch.ones(256)}, SHAPES)
    assert lora.tensors["diffusion_model.blocks.0.self_attn.q.dora_scale"].shape == (256, 1)


def test_distillations_go_by_their_names():
    for name in (
        "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors",
        "Wan22-Lightning/high_noise_model.safetensors",
        "Wan21_CausVid_14B_T2V_lora_rank32_v2.safetensors",
        "Wan_2_1_T2V_14B_480p_rCM_lora_rank_64.safetensors",
    ):
        assert is_distillation(name)
    assert not is_distillation("warcmaster.safetensors")
    assert not is_distillation("wan22_14b_i2v_orbit_high_noise.safetensors")
