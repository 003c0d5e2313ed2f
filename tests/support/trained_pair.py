"""A tiny base and what its two trainings could have made of it, for what merges them."""

from pathlib import Path

import tiny_models
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
ROLES = ("base", "sla", "rcm")
PROJ_L = ".proj_l."


def base(dtype: torch.dtype = torch.float32, layers: int = 2) -> Tensors:
    """A float Wan model without proj_l."""
    tensors = tiny_models.stock_checkpoint(layers=layers)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def tuned(start: Tensors, seed: int, size: float = 0.02) -> Tensors:
    """`start` after a training: each tensor moved by `size` of its own length."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        step = torch.randn(tensor.shape, generator=generator)
        scale = size * tensor.float().norm().clamp(min=1e-3) / step.norm()
        return (tensor.float() + scale * step).to(tensor.dtype)

    return {name: moved(tensor) for name, tensor in start.items()}


def with_proj_l(tensors: Tensors, seed: int = 3) -> Tensors:
    """`tensors` with SLA's projections, float32."""
    generator = torch.Generator().manual_seed(seed)
    projections = {}
    for index in {name.split(".")[1] for name in tensors if name.startswith("blocks.")}:
        name = f"blocks.{index}.self_attn.attn_op.local_attn.proj_l"
        projections[f"{name}.weight"] = torch.randn(128, 128, generator=generator) / 128**0.5
        projections[f"{name}.bias"] = torch.randn(128, generator=generator) * 0.02
    return {**tensors, **projections}


def trio(dtype: torch.dtype = torch.float32) -> dict[str, Tensors]:
    """Base, SLA and rCM."""
    start = base(dtype)
    return {"base": start, "sla": with_proj_l(tuned(start, 1)), "rcm": tuned(start, 2)}


def write(trained: dict[str, Tensors], folder: Path) -> dict[str, Path]:
    """Each as FOLDER/ROLE.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {role: folder / f"{role}.safetensors" for role in trained}
    for role, tensors in trained.items():
        save_file({name: t.contiguous() for name, t in tensors.items()}, paths[role])
    return paths
