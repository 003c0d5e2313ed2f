"""Random models of real size, made on the GPU; in a worker of the pack as well as here."""

import importlib
import math
import sys

import torch

# The pack's name in this process: that of a worker, see turbo_core/parallel/worker.py, or of tests.
PACK = next(name for name in ("turbodiffusion_wan", "turbodiffusion_pack") if name in sys.modules)
Checkpoint = importlib.import_module(f"{PACK}.turbo_core.checkpoint").Checkpoint
Shape = importlib.import_module(f"{PACK}.turbo_core.forward_time").Shape


def random_model(sizes: tuple, seed: int, device: str):
    """The same MODEL of a Shape's `sizes` in every process."""
    torch.manual_seed(seed)
    checkpoint = random_checkpoint(Shape(*sizes), device)
    return importlib.import_module(f"{PACK}.turbo_core.host.load").build_turbo_model(checkpoint)


def random_checkpoint(shape: Shape, device: str = "cuda") -> Checkpoint:
    """Weights of the right shapes and sizes on `device`, scaled so that activations stay normal."""
    tensors, scales, proj_l = {}, {}, []
    dim, ffn = shape.dim, shape.ffn_dim

    def normal(*size, std=1.0, dtype=torch.bfloat16):
        return (torch.randn(*size, device=device) * std).to(dtype)

    def linear(name, out, inner):
        tensors[f"{name}.weight"] = normal(out, inner, std=inner**-0.5)
        tensors[f"{name}.bias"] = normal(out, std=0.02)

    def int8_linear(name, out, inner):
        weight = torch.randn(out, inner, device=device) * 32
        tensors[f"{name}.weight"] = weight.round_().clamp_(-128, 127).to(torch.int8)
        tensors[f"{name}.bias"] = normal(out, std=0.02)
        blocks = math.ceil(out / 128), math.ceil(inner / 128)
        scales[name] = torch.full(blocks, inner**-0.5 / 32, device=device)

    tensors["patch_embedding.weight"] = normal(dim, shape.in_channels, 1, 2, 2, std=0.1)
    tensors["patch_embedding.bias"] = normal(dim, std=0.02)
    linear("text_embedding.0", dim, 4096)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, 256)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    for i in range(shape.num_layers):
        block = f"blocks.{i}"
        tensors[f"{block}.modulation"] = normal(1, 6, dim, std=0.1)
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                int8_linear(f"{block}.{attention}.{name}", dim, dim)
            for norm in ("norm_q", "norm_k"):
                tensors[f"{block}.{attention}.{norm}.weight"] = torch.ones(dim, device=device)
        tensors[f"{block}.norm3.weight"] = torch.ones(dim, device=device)
        tensors[f"{block}.norm3.bias"] = torch.zeros(dim, device=device)
        int8_linear(f"{block}.ffn.0", ffn, dim)
        int8_linear(f"{block}.ffn.2", dim, ffn)
        weight = normal(128, 128, std=0.05, dtype=torch.float32)
        proj_l.append((weight, torch.zeros(128, device=device)))
    tensors["head.modulation"] = normal(1, 2, dim, std=0.1)
    linear("head.head", 64, dim)
    sizes = {"num_layers": shape.num_layers, "in_channels": shape.in_channels}
    return Checkpoint(tensors, scales, tuple(proj_l), dim, ffn, **sizes)
