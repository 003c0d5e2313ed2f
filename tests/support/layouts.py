"""A checkpoint in every layout that TurboDiffusion models are found in, and comparisons of them.

The layouts follow what their makers' converters do, not the pack's own tables.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from turbodiffusion_pack.turbo_core.checkpoint import Checkpoint

Tensors = dict[str, torch.Tensor]
PROJ_L = "self_attn.attn_op.local_attn.proj_l"

# (Wan's name, theirs), the first that matches counts.
FASTVIDEO = [
    (r"self_attn\.attn_op\.local_attn\.proj_l\.", "attn1.attn_impl.proj_l."),
    (r"self_attn\.o\.", "to_out."),
    (r"self_attn\.([qkv])\.", r"to_\1."),
    (r"self_attn\.norm_", "norm_"),
    (r"cross_attn\.o\.", "attn2.to_out."),
    (r"cross_attn\.([qkv])\.", r"attn2.to_\1."),
    (r"cross_attn\.norm_", "attn2.norm_"),
    (r"norm3\.", "self_attn_residual_norm.norm."),
    (r"ffn\.0\.", "ffn.fc_in."),
    (r"ffn\.2\.", "ffn.fc_out."),
    (r"text_embedding\.0\.", "condition_embedder.text_embedder.fc_in."),
    (r"text_embedding\.2\.", "condition_embedder.text_embedder.fc_out."),
    (r"time_embedding\.0\.", "condition_embedder.time_embedder.mlp.fc_in."),
    (r"time_embedding\.2\.", "condition_embedder.time_embedder.mlp.fc_out."),
    (r"time_projection\.1\.", "condition_embedder.time_modulation.linear."),
    (r"head\.head\.", "proj_out."),
    (r"(head\.)?modulation$", "scale_shift_table"),
]
SGLANG = [
    (r"self_attn\.attn_op\.", "attn1.attn_op."),
    (r"self_attn\.o\.", "attn1.to_out.0."),
    (r"self_attn\.([qkv])\.", r"attn1.to_\1."),
    (r"self_attn\.norm_", "attn1.norm_"),
    (r"cross_attn\.o\.", "attn2.to_out.0."),
    (r"cross_attn\.([qkv])\.", r"attn2.to_\1."),
    (r"cross_attn\.norm_", "attn2.norm_"),
    (r"norm3\.", "norm2."),
    (r"ffn\.0\.", "ffn.net.0.proj."),
    (r"ffn\.2\.", "ffn.net.2."),
    (r"text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"time_projection\.1\.", "condition_embedder.time_proj."),
    (r"head\.head\.", "proj_out."),
    (r"(head\.)?modulation$", "scale_shift_table"),
]


def named(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    return {rename(name): tensor for name, tensor in tensors.items()}


def ruled(rules: list[tuple[str, str]]) -> Callable[[str], str]:
    """Renames by the first rule that matches at the start or behind "blocks.N."."""

    def rename(name: str) -> str:
        block = re.match(r"(blocks\.\d+\.)?", name)[0]
        for pattern, theirs in rules:
            if re.match(pattern, name[len(block) :]):
                return block + re.sub(pattern, theirs, name[len(block) :], count=1)
        return name

    return rename


def conv(tensors: Tensors) -> Tensors:
    """With the patch embedding as a Conv3d."""
    weight = tensors["patch_embedding.weight"].unflatten(1, (-1, 1, 2, 2))
    return {**tensors, "patch_embedding.weight": weight}


def under_weight(tensors: Tensors, scale: str) -> Tensors:
    """INT8 weights under ".weight", their scales under `scale`."""
    names = {".int8_weight": ".weight", ".scale": f".{scale}"}
    return named(tensors, lambda n: re.sub(r"\.(int8_weight|scale)$", lambda m: names[m[0]], n))


def save(tensors: dict, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)
    return path


def save_shards(tensors: Tensors, folder: Path, count: int = 3) -> Path:
    """A diffusers folder of `count` shards and their index; returns the index."""
    names, places = sorted(tensors), {}
    for number in range(1, count + 1):
        file = f"diffusion_pytorch_model-{number:05}-of-{count:05}.safetensors"
        shard = {name: tensors[name] for name in names[number - 1 :: count]}
        save(shard, folder / file)
        places.update(dict.fromkeys(shard, file))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


def training(tensors: Tensors, folder: Path) -> Path:
    wrapped = named(conv(tensors), lambda n: f"net.{n}")
    return save({"state_dict": wrapped, "iteration": 7}, folder / "training.pth")


def training_with_averages(tensors: Tensors, folder: Path) -> Path:
    raw = {f"net.{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    averaged = named(conv(tensors), lambda n: f"net_ema.{n}")
    return save({"model": {**raw, **averaged}, "optimizer": {"lr": 1e-5}}, folder / "ema.pth")


def wrapped_modules(tensors: Tensors, folder: Path) -> Path:
    def rename(name: str) -> str:
        name = name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn.")
        return "module._orig_mod.net." + name.replace("ffn.", "ffn._fsdp_wrapped_module.")

    return save({"model": {"state_dict": named(tensors, rename)}}, folder / "wrapped.pth")


def whole_checkpoint(tensors: Tensors, folder: Path) -> Path:
    tensors = named(conv(tensors), lambda n: f"model.diffusion_model.{n}")
    tensors["first_stage_model.encoder.conv1.weight"] = torch.ones(3)
    return save(tensors, folder / "whole.safetensors")


def plain_diffusion_model(tensors: Tensors, folder: Path) -> Path:
    return save(named(tensors, lambda n: f"diffusion_model.{n}"), folder / "plain.safetensors")


def model_save(tensors: Tensors, folder: Path) -> Path:
    """What ComfyUI's ModelSave writes of a MODEL of TurboLoader's."""
    tensors = named(conv(tensors), lambda n: n.replace(PROJ_L, "self_attn.proj_l"))
    tensors = named(under_weight(tensors, "weight_scale"), lambda n: f"model.diffusion_model.{n}")
    return save(tensors, folder / "model_save.safetensors")


def fastvideo(tensors: Tensors, folder: Path) -> Path:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    return save(named(conv(tensors), ruled(FASTVIDEO)), file).parent


def fastvideo_in_memory(tensors: Tensors, folder: Path) -> Path:
    """FastVideo's module names, as its trainer saves them."""
    rules = [(r"patch_embedding\.", "patch_embedding.proj."), *FASTVIDEO]
    return save({"state_dict": named(conv(tensors), ruled(rules))}, folder / "fastvideo.pt")


def sglang(tensors: Tensors, folder: Path) -> Path:
    return save(named(conv(tensors), ruled(SGLANG)), folder / "sglang.safetensors")


def sglang_shards(tensors: Tensors, folder: Path) -> Path:
    tensors = under_weight(named(conv(tensors), ruled(SGLANG)), "weight_scale_inv")
    return save_shards(tensors, folder / "transformer_2")


def one_of_the_shards(tensors: Tensors, folder: Path) -> Path:
    index = sglang_shards(tensors, folder)
    return index.with_name("diffusion_pytorch_model-00002-of-00003.safetensors")


def official(tensors: Tensors, folder: Path) -> Path:
    return save(tensors, folder / "official.pth")


def official_safetensors(tensors: Tensors, folder: Path) -> Path:
    return save(tensors, folder / "official.safetensors")


# Each writes `tensors`, official names and shapes, into a folder and returns what to open.
LAYOUTS = {
    layout.__name__: layout
    for layout in (
        official,
        official_safetensors,
        training,
        training_with_averages,
        wrapped_modules,
        whole_checkpoint,
        plain_diffusion_model,
        model_save,
        fastvideo,
        fastvideo_in_memory,
        sglang,
        sglang_shards,
        one_of_the_shards,
    )
}


def as_official(checkpoint: Checkpoint) -> Tensors:
    """The checkpoint's tensors by the names that the official files use."""
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        module = name.removesuffix(".weight")
        tensors[f"{module}.int8_weight" if module in checkpoint.scales else name] = tensor
    for module, scale in checkpoint.scales.items():
        tensors[f"{module}.scale"] = scale
    for index, (weight, bias) in enumerate(checkpoint.proj_l):
        tensors[f"blocks.{index}.{PROJ_L}.weight"] = weight
        tensors[f"blocks.{index}.{PROJ_L}.bias"] = bias
    return tensors


def assert_same(tensors: Tensors, expected: Tensors) -> None:
    """Same names, dtypes, shapes and bits."""
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(bits(tensor), bits(expected[name])), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_holds(checkpoint: Checkpoint, expected: Tensors) -> None:
    """The checkpoint is `expected`, whose patch embedding may be a Linear's."""
    if expected["patch_embedding.weight"].ndim == 2:
        expected = conv(expected)
    assert_same(as_official(checkpoint), expected)


def mapped_file(tensor: torch.Tensor) -> str:
    """Which file, if any, the tensor's first and last byte are mapped from."""
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *file = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in span.split("-"))
        if start <= first and last < end:
            return file[0] if file else ""
    return ""
