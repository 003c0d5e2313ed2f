"""Every layout that TurboDiffusion models are found in gives the official file's tensors."""

from pathlib import Path

import pytest
import torch
from goldens import unpack_checkpoint
from layouts import (
    LAYOUTS,
    as_official,
    assert_holds,
    mapped_file,
    save,
    save_shards,
    sglang_shards,
)
from turbodiffusion_pack.turbo_core.checkpoint import read_checkpoint
from turbodiffusion_pack.turbo_core.checkpoint.shards import read_files

MODELS = ("t2v.pth", "t2v-quant.pth", "i2v")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("official")
    models = {n: torch.load(unpack_checkpoint(n, folder), mmap=True) for n in MODELS[:2]}
    wider = torch.randn(256, 36 * 4, generator=torch.Generator().manual_seed(1)).bfloat16()
    return {**models, "i2v": {**models["t2v-quant.pth"], "patch_embedding.weight": wider}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_gives_the_official_tensors(models, tmp_path, model, layout):
    path = LAYOUTS[layout](models[model], tmp_path)
    checkpoint = read_checkpoint(path)
    assert_holds(checkpoint, models[model])
    assert checkpoint.in_channels == (36 if model == "i2v" else 16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_stays_memory_mapped(models, tmp_path, layout):
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc/self/maps")
    path = LAYOUTS[layout](models["t2v-quant.pth"], tmp_path)
    files = {mapped_file(tensor) for tensor in as_official(read_checkpoint(path)).values()}
    written = {str(f) for f in tmp_path.rglob("*.*") if f.suffix in (".pth", ".pt", ".safetensors")}
    assert files == written


def test_a_folder_of_shards_is_read_through_its_index(models, tmp_path):
    folder = sglang_shards(models["t2v-quant.pth"], tmp_path).parent
    assert_holds(read_checkpoint(folder), models["t2v-quant.pth"])


def test_the_only_shard_needs_no_index(models, tmp_path):
    index = save_shards(models["t2v-quant.pth"], tmp_path, count=1)
    index.unlink()
    path = tmp_path / "diffusion_pytorch_model-00001-of-00001.safetensors"
    assert_holds(read_checkpoint(path), models["t2v-quant.pth"])


def test_a_layout_in_16_bits_throughout(models, tmp_path):
    """Training scripts save everything in bf16, norms and projections too."""
    tensors = {name: tensor.bfloat16() for name, tensor in models["t2v.pth"].items()}
    assert_holds(read_checkpoint(LAYOUTS["training"](tensors, tmp_path)), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lightx2vs_int8_with_a_scale_per_channel(models, tmp_path, dtype):
    """X.weight in int8 and X.weight_scale [out, 1] in the weight's own dtype."""
    file = dict(models["t2v.pth"])
    linears = [n for n in file if n.startswith("blocks.") and file[n].ndim == 2]
    linears = [name for name in linears if "modulation" not in name and "proj_l" not in name]
    for name in linears:
        weight = file[name].to(dtype)
        file[f"{name}_scale"] = weight.abs().amax(1, keepdim=True) / 127
        file[name] = (weight / file[f"{name}_scale"]).round().clamp(-128, 127).to(torch.int8)
    checkpoint = read_checkpoint(save(file, tmp_path / "lightx2v.safetensors"))
    assert len(checkpoint.scales) == len(linears) == 20
    for name in linears:
        scale = checkpoint.scales[name.removesuffix(".weight")]
        assert (scale.dtype, scale.shape) == (torch.float32, (len(file[name]),))
        assert torch.equal(scale, file[f"{name}_scale"].flatten().float())
        assert torch.equal(checkpoint.tensors[name], file[name])


# Names as the makers' files have them, so that no layout is the official one by mistake.
EXAMPLES = {
    "official": ["blocks.1.ffn.0.int8_weight", "blocks.1.ffn.0.scale", "head.modulation"],
    "training": ["net.blocks.0.self_attn.q.bias", "net.patch_embedding.weight"],
    "training_with_averages": ["net_ema.blocks.0.norm3.weight", "net.blocks.0.norm3.weight"],
    "wrapped_modules": [
        "module._orig_mod.net.blocks.0._checkpoint_wrapped_module.self_attn.q.bias",
        "module._orig_mod.net.blocks.0.ffn._fsdp_wrapped_module.2.bias",
    ],
    "whole_checkpoint": ["model.diffusion_model.head.head.weight"],
    "plain_diffusion_model": ["diffusion_model.head.head.weight"],
    "model_save": [
        "model.diffusion_model.blocks.0.self_attn.proj_l.weight",
        "model.diffusion_model.blocks.0.ffn.2.weight_scale",
    ],
    "fastvideo": [
        "blocks.0.to_q.int8_weight",
        "blocks.0.to_out.bias",
        "blocks.1.norm_k.weight",
        "blocks.1.attn2.to_out.scale",
        "blocks.1.attn2.norm_q.weight",
        "blocks.1.self_attn_residual_norm.norm.bias",
        "blocks.1.attn1.attn_impl.proj_l.weight",
        "blocks.0.ffn.fc_out.bias",
        "blocks.0.scale_shift_table",
        "condition_embedder.time_embedder.mlp.fc_in.weight",
        "condition_embedder.time_modulation.linear.weight",
        "scale_shift_table",
        "proj_out.weight",
    ],
    "sglang_shards": [
        "blocks.0.attn1.to_q.weight",
        "blocks.0.attn1.to_q.weight_scale_inv",
        "blocks.0.attn1.to_out.0.bias",
        "blocks.1.attn1.norm_k.weight",
        "blocks.1.attn2.to_out.0.weight",
        "blocks.1.norm2.weight",
        "blocks.1.attn1.attn_op.local_attn.proj_l.weight",
        "blocks.0.ffn.net.0.proj.bias",
        "blocks.0.ffn.net.2.bias",
        "condition_embedder.text_embedder.linear_2.weight",
        "condition_embedder.time_proj.weight",
    ],
}


@pytest.mark.parametrize("layout", EXAMPLES)
def test_the_fixtures_have_their_makers_names(models, tmp_path, layout):
    names = read_files(LAYOUTS[layout](models["t2v-quant.pth"], tmp_path))
    assert [name for name in EXAMPLES[layout] if name not in names] == []
