"""Tiny random models: checkpoints in the official format, a plain Wan model, a LoRA, a Wan VAE.

    python tests/support/tiny_models.py COMFYUI_DIR VAE_FILE

writes the VAE; it runs as its own process because importing ComfyUI takes over sys.path and argv.
"""

import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

HEAD_DIM = 128
TEXT_DIM = 4096
FREQ_DIM = 256
PATCH = 16 * 1 * 2 * 2  # latent channels x the patch (1, 2, 2)
T2V_CHANNELS = 16
I2V_CHANNELS = 36  # 16 of the latent, 4 of a mask, 16 of the image
BLOCK = 128
VAE_CONFIG = {
    "dim": 8,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}


def i2v_checkpoint(seed: int = 0, **sizes) -> dict[str, torch.Tensor]:
    """One expert of a random Wan 2.2 I2V model; another seed makes the other expert."""
    return t2v_checkpoint(seed, **sizes, in_channels=I2V_CHANNELS)


def t2v_checkpoint(
    seed: int = 0,
    dim: int = 256,
    ffn: int = 512,
    layers: int = 2,
    in_channels: int = T2V_CHANNELS,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """A random Wan T2V state dict as TurboDiffusion's `-quant.pth` files hold it."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, std=None, mean=0.0, dtype=torch.bfloat16):
        scale = shape[-1] ** -0.5 if std is None else std
        values = torch.randn(shape, generator=generator, device=device)
        return (values * scale + mean).to(dtype)

    def linear(name, out_features, in_features):
        return {
            f"{name}.weight": normal(out_features, in_features),
            f"{name}.bias": normal(out_features, std=0.02),
        }

    def norm(name):
        return {name: normal(dim, std=0.1, mean=1.0, dtype=torch.float32)}

    def attention(name):
        tensors = norm(f"{name}.norm_q.weight") | norm(f"{name}.norm_k.weight")
        for projection in "qkvo":
            tensors |= quantized(linear(f"{name}.{projection}", dim, dim))
        return tensors

    def block(name):
        proj_l = f"{name}.self_attn.attn_op.local_attn.proj_l"
        return {
            f"{name}.modulation": normal(1, 6, dim),
            f"{proj_l}.weight": normal(HEAD_DIM, HEAD_DIM, dtype=torch.float32),
            f"{proj_l}.bias": normal(HEAD_DIM, std=0.02, dtype=torch.float32),
            f"{name}.norm3.bias": normal(dim, std=0.02, dtype=torch.float32),
            **norm(f"{name}.norm3.weight"),
            **attention(f"{name}.self_attn"),
            **attention(f"{name}.cross_attn"),
            **quantized(linear(f"{name}.ffn.0", ffn, dim)),
            **quantized(linear(f"{name}.ffn.2", dim, ffn)),
        }

    tensors = {
        **linear("patch_embedding", dim, in_channels * PATCH // 16),
        **linear("text_embedding.0", dim, TEXT_DIM),
        **linear("text_embedding.2", dim, dim),
        **linear("time_embedding.0", dim, FREQ_DIM),
        **linear("time_embedding.2", dim, dim),
        **linear("time_projection.1", 6 * dim, dim),
        **linear("head.head", PATCH, dim),
        "head.modulation": normal(1, 2, dim),
    }
    for i in range(layers):
        tensors |= block(f"blocks.{i}")
    return tensors


def quantized(linear: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{X.weight, X.bias} as {X.int8_weight, X.scale, X.bias}, in blocks of 128 x 128."""
    (name,) = (key for key in linear if key.endswith(".weight"))
    rows, columns = (size // BLOCK for size in linear[name].shape)
    blocks = linear[name].float().view(rows, BLOCK, columns, BLOCK)
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-8)
    integers = (blocks * (128 / amax)).round().clamp(-128, 127).to(torch.int8)
    stem = name.removesuffix("weight")
    return {
        f"{stem}int8_weight": integers.view(linear[name].shape),
        f"{stem}scale": (amax / 128).view(rows, columns),
        f"{stem}bias": linear[f"{stem}bias"],
    }


def stock_checkpoint(seed: int = 0, **sizes) -> dict[str, torch.Tensor]:
    """A random Wan T2V state dict as ComfyUI's own loader takes: in bf16, without projections."""
    turbo, tensors = t2v_checkpoint(seed, **sizes), {}
    for name, tensor in turbo.items():
        if name.endswith(".int8_weight"):
            stem = name.removesuffix("int8_weight")
            scale = turbo[f"{stem}scale"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            tensors[f"{stem}weight"] = (tensor * scale).bfloat16()
        elif not name.endswith(".scale") and ".proj_l." not in name:
            tensors[name] = tensor
    embedding = tensors["patch_embedding.weight"]
    tensors["patch_embedding.weight"] = embedding.unflatten(1, (-1, 1, 2, 2))
    return tensors


def lora(seed: int = 0, dim: int = 256, rank: int = 4) -> dict[str, torch.Tensor]:
    """A random LoRA on q of the first block's self-attention."""
    generator = torch.Generator().manual_seed(seed)
    name = "diffusion_model.blocks.0.self_attn.q"
    return {
        f"{name}.lora_A.weight": torch.randn(rank, dim, generator=generator),
        f"{name}.lora_B.weight": torch.randn(dim, rank, generator=generator),
    }


def write_checkpoint(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)


def write_picture(path: Path, width: int = 1280, height: int = 720) -> None:
    """Two colours that run into each other, for image to video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    across, down = (Image.linear_gradient("L").rotate(angle) for angle in (90, 0))
    blue = Image.new("L", across.size, 120)
    Image.merge("RGB", (across, down, blue)).resize((width, height)).save(path)


def write_vae(comfyui: Path, path: Path) -> None:
    """A random Wan 2.1 VAE of 0.9 M parameters that ComfyUI's own VAELoader takes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, __file__, str(comfyui), str(path)], check=True)


def vae_state_dict(comfyui: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    sys.path.insert(0, str(comfyui))
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    from comfy.ldm.wan.vae import WanVAE

    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in WanVAE(**VAE_CONFIG).state_dict().items()}
    return {name: vae_tensor(name, shape, generator) for name, shape in shapes.items()}


def vae_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith(".gamma"):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * shape[1:].numel() ** -0.5


if __name__ == "__main__":
    comfyui_folder, vae_file = sys.argv[1:]
    save_file(vae_state_dict(Path(comfyui_folder)), vae_file)
