"""Times one forward pass of TurboDiffusion models on this GPU, through ComfyUI's Wan model.

    COMFYUI_DIR=/path/ComfyUI python tests/benchmarks/forward.py --models 1.3B-480P 14B-720P

Real shapes and layer counts, random INT8 weights made on the GPU, the MODEL built as TurboLoader
builds it and driven as a sampler drives it. Prints medians, the share of the arithmetic floor, peak
memory and a table of kernels.
"""

import argparse
import gc
import json
import math
import os
import sys
import types
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT]
sys.path.append(str(ROOT / "tests" / "support"))
pack = types.ModuleType("turbodiffusion_pack")
pack.__path__ = [str(ROOT)]
sys.modules["turbodiffusion_pack"] = pack
arguments, sys.argv = sys.argv, sys.argv[:1]

import in_comfyui  # noqa: E402
from gpu_timing import median_ms  # noqa: E402
from in_comfyui import comfy_attention, comfy_loader  # noqa: E402
from turbodiffusion_pack.turbo_core.checkpoint import Checkpoint  # noqa: E402
from turbodiffusion_pack.turbo_core.sla_settings import ATTENTIONS, SLASettings  # noqa: E402


class Shape(NamedTuple):
    dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    width: int
    height: int
    frames: int = 81

    @property
    def latent(self) -> tuple[int, int, int]:
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        t, h, w = self.latent
        return t * (h // 2) * (w // 2)


MODELS = {
    "1.3B-480P": Shape(1536, 8960, 30, 16, 832, 480),
    "14B-480P": Shape(5120, 13824, 40, 16, 832, 480),
    "14B-720P": Shape(5120, 13824, 40, 16, 1280, 720),
    "A14B-I2V-720P": Shape(5120, 13824, 40, 36, 1280, 720),
}
TEXT_LENGTH = 512


def random_checkpoint(shape: Shape) -> Checkpoint:
    """Weights of the right shapes and sizes on the GPU, scaled so that activations stay normal."""
    tensors, scales, proj_l = {}, {}, []
    dim, ffn = shape.dim, shape.ffn_dim

    def normal(*size, std=1.0, dtype=torch.bfloat16):
        return (torch.randn(*size, device="cuda") * std).to(dtype)

    def linear(name, out, inner):
        tensors[f"{name}.weight"] = normal(out, inner, std=inner**-0.5)
        tensors[f"{name}.bias"] = normal(out, std=0.02)

    def int8_linear(name, out, inner):
        weight = torch.randn(out, inner, device="cuda") * 32
        tensors[f"{name}.weight"] = weight.round_().clamp_(-128, 127).to(torch.int8)
        tensors[f"{name}.bias"] = normal(out, std=0.02)
        blocks = math.ceil(out / 128), math.ceil(inner / 128)
        scales[name] = torch.full(blocks, inner**-0.5 / 32, device="cuda")

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
                tensors[f"{block}.{attention}.{norm}.weight"] = torch.ones(dim, device="cuda")
        tensors[f"{block}.norm3.weight"] = torch.ones(dim, device="cuda")
        tensors[f"{block}.norm3.bias"] = torch.zeros(dim, device="cuda")
        int8_linear(f"{block}.ffn.0", ffn, dim)
        int8_linear(f"{block}.ffn.2", dim, ffn)
        weight = normal(128, 128, std=0.05, dtype=torch.float32)
        proj_l.append((weight, torch.zeros(128, device="cuda")))
    tensors["head.modulation"] = normal(1, 2, dim, std=0.1)
    linear("head.head", 64, dim)
    sizes = {"num_layers": shape.num_layers, "in_channels": shape.in_channels}
    return Checkpoint(tensors, scales, tuple(proj_l), dim, ffn, **sizes)


def operations(shape: Shape, settings: SLASettings) -> float:
    """Tensor-core operations of one forward pass: linears, selected attention blocks, text."""
    length, dim, ffn = shape.tokens, shape.dim, shape.ffn_dim
    linears = 2 * length * (6 * dim * dim + 2 * dim * ffn) + 2 * TEXT_LENGTH * 2 * dim * dim
    share = 1.0 if settings.attention == "dense" else settings.topk
    attention = 4 * length * dim * (length * share + TEXT_LENGTH)
    return shape.num_layers * (linears + attention)


def make_forward(shape: Shape, settings: SLASettings):
    """A function that runs one forward pass."""
    model = comfy_loader.build_turbo_model(random_checkpoint(shape))
    model = comfy_attention.patch_attention(model, settings)
    in_comfyui.comfy.model_management.load_models_gpu([model])
    channels = [16, shape.in_channels - 16]
    x, concat = (torch.randn(1, c, *shape.latent, device="cuda") for c in channels)
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    inputs = {
        "c_concat": concat if concat.shape[1] else None,
        "c_crossattn": torch.randn(1, TEXT_LENGTH, 4096, device="cuda") * 0.1,
        "transformer_options": options,
    }
    sigma = torch.tensor([0.9338], device="cuda")
    return lambda: model.model.apply_model(x, sigma, **inputs)


def kernel_table(run) -> list[dict]:
    """GPU time of one run by kernel, most first."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    rows = [
        {"kernel": e.key, "calls": e.count, "ms": e.device_time_total / 1000}
        for e in profile.key_averages()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def measure(name: str, settings: SLASettings, runs: int, ceiling: float) -> dict:
    shape = MODELS[name]
    run = make_forward(shape, settings)
    finite = bool(run().isfinite().all())
    torch.cuda.reset_peak_memory_stats()
    ms = median_ms(run, runs)
    tops = operations(shape, settings) / ms / 1e9
    result = {
        "model": name,
        "attention": settings.attention,
        "topk": settings.topk,
        "ms": round(ms, 1),
        "tops": round(tops),
        "share_of_floor": round(tops / ceiling, 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "finite": finite,
        "kernels": kernel_table(run),
    }
    in_comfyui.comfy.model_management.unload_all_models()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1.3B-480P", "14B-720P"])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["sagesla"])
    parser.add_argument("--topk", type=float, default=0.1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ceiling", type=float, default=1979, help="the card's INT8 TOPS")
    parser.add_argument("--rows", type=int, default=20, help="kernels to list")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args(arguments[1:])
    results = []
    with torch.inference_mode():
        for name in options.models:
            for attention in options.attention:
                settings = SLASettings(attention, options.topk)
                results.append(measure(name, settings, options.runs, options.ceiling))
                gc.collect()  # a model holds itself through its patched forwards
                show(results[-1], options.rows)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def show(result: dict, rows: int) -> None:
    write = sys.stdout.write
    write(json.dumps({k: v for k, v in result.items() if k != "kernels"}) + "\n")
    for row in result["kernels"][:rows]:
        write(f"  {row['ms']:9.2f} ms {row['calls']:5d} x  {row['kernel'][:90]}\n")


if __name__ == "__main__":
    main()
