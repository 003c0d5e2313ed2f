"""What a file may hold beside Wan's tensors: SLA's projections, ComfyUI's settings of layers."""

import json

import torch

from .checks import Pairs, Tensors, check_shapes, describe
from .error import CheckpointError
from .names import PROJ_L
from .sizes import HEAD_DIM, linear_shapes

# The attention backend that a layer asks ComfyUI (0.40) for: JSON text in uint8, no weight.
LAYER_SETTING = ".comfy_attention.config"
LONGEST_SETTING = 65536


def split_layer_settings(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Set ComfyUI's settings of single layers apart.

    Returns:
        The tensors without them, and the settings, uint8 [n] each, by name
        ("blocks.0.self_attn.comfy_attention.config").
    """
    settings = {n: t for n, t in tensors.items() if n.endswith(LAYER_SETTING)}
    for name, setting in settings.items():
        if setting.dtype != torch.uint8 or setting.ndim != 1 or not _is_json(setting):
            raise CheckpointError(
                f"{name} must be a layer's setting as ComfyUI writes it, JSON text in uint8, got "
                f"{describe(setting)}: download or convert the file again"
            )
    return {n: t for n, t in tensors.items() if n not in settings}, settings


def _is_json(setting: torch.Tensor) -> bool:
    if not 0 < setting.numel() <= LONGEST_SETTING:
        return False
    try:
        found = json.loads(bytes(setting.tolist()))
    except (ValueError, RecursionError):
        return False
    choices = found if isinstance(found, list) else [found]  # the first that the card can do
    return all(isinstance(choice, dict) for choice in choices)


def split_proj_l(tensors: Tensors, num_layers: int) -> tuple[Tensors, Pairs]:
    """Set SLA's projections apart.

    Returns:
        The tensors without them, and (weight [128, 128], bias [128]) of each block; an empty tuple
        where no block has one.
    """
    shapes = {}
    for index in range(num_layers):
        shapes.update(linear_shapes(f"blocks.{index}.{PROJ_L}", HEAD_DIM, HEAD_DIM))
    names = list(shapes)
    missing = [name for name in names if name not in tensors]
    if len(missing) == len(names):
        return tensors, ()
    if missing:
        raise CheckpointError(
            f"{missing[0]} is missing, but {len(names) - len(missing)} of {len(names)} proj_l "
            "tensors are there: download or convert the file again"
        )
    check_shapes(tensors, shapes)
    pairs = zip(names[::2], names[1::2], strict=True)
    proj_l = tuple((tensors[weight], tensors[bias]) for weight, bias in pairs)
    return {n: t for n, t in tensors.items() if n not in shapes}, proj_l
