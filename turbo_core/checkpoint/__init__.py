"""TurboDiffusion checkpoints: a file in, a checked set of Wan tensors out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from einops import rearrange

from .checks import check_dtypes, check_shapes, check_values, small_tensors
from .error import CheckpointError, errors_named
from .extras import split_layer_settings, split_proj_l
from .names import PROJ_L, wan_names
from .scales import split_scales
from .shards import read_files
from .sizes import HEAD_DIM, conv_patch_embedding, read_sizes, wan_shapes

NAMES = ("official", "comfy")

__all__ = [
    "NAMES",
    "Checkpoint",
    "CheckpointError",
    "check_tensors",
    "file_tensors",
    "int8_in_file",
    "read_checkpoint",
    "read_named_tensors",
]


@dataclass(frozen=True)
class Checkpoint:
    """A complete Wan transformer, checked; its tensors are views of the file where it allows that.

    Attributes:
        tensors: Wan's own names ("blocks.0.self_attn.q.weight"), dtypes as in the file; an INT8
            weight is int8 [out, in] under the same name. patch_embedding.weight is
            [dim, in, 1, 2, 2]. No scales and no proj_l.
        scales: fp32 [ceil(out/128), ceil(in/128)], or [out] where one scale serves an output
            channel, of every INT8 weight, by module name ("blocks.0.self_attn.q"); empty in a plain
            checkpoint.
        proj_l: SLA's (weight [128, 128], bias [128]) of each block in order; empty without SLA.
        dim: model width; the heads are 128 wide.
        ffn_dim: width inside the feed-forward layers.
        num_layers: number of blocks.
        in_channels: 16 (text to video) or 36 (image to video: 16 + 4 mask + 16 image).
        layer_settings: ComfyUI's settings of single layers, uint8 [n] of JSON text, by name
            ("blocks.0.self_attn.comfy_attention.config"); empty in nearly every file.
    """

    tensors: dict[str, torch.Tensor]
    scales: dict[str, torch.Tensor]
    proj_l: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    layer_settings: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def head_dim(self) -> int:
        return HEAD_DIM

    @property
    def has_sla(self) -> bool:
        return bool(self.proj_l)

    @property
    def quantized(self) -> bool:
        return bool(self.scales)


def read_checkpoint(
    path: str | PathLike, progress: Callable[[int, int], None] | None = None
) -> Checkpoint:
    """Read a TurboDiffusion (or plain Wan) checkpoint of any known layout, checked as a whole.

    Nothing is copied or converted, and of the big weights not one byte is read: they stay
    memory-mapped. What the file is gets decided from its bytes and from its tensors' names and
    shapes; of its own name only the suffix must be one of a checkpoint's.

    Args:
        path: a .pth, .pt or .safetensors file; of a set of shards any shard, the index or the
            folder. Names as TurboDiffusion, FastVideo or SGLang write them, with or without the
            usual prefixes ("net.", ...).
        progress: called with (done, total) while the small tensors are looked through.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, incomplete or another model; the
            message names the file (without its folder, as it may reach a client of the server),
            what was found and what to do.
    """
    with errors_named(path):
        return check_tensors(wan_names(read_files(Path(path))), progress)


def read_named_tensors(path: str | PathLike) -> dict[str, torch.Tensor]:
    """All tensors of a file by the names that they have in it, for what is no checkpoint.

    Raises:
        CheckpointError: as read_checkpoint, as far as it is about files.
    """
    with errors_named(path):
        return read_files(Path(path))


def check_tensors(
    tensors: dict[str, torch.Tensor], progress: Callable[[int, int], None] | None = None
) -> Checkpoint:
    """The checkpoint that `tensors`, under Wan's names, make up.

    Raises:
        CheckpointError: they make up none; the message says what was found and what to do.
    """
    tensors, settings = split_layer_settings(tensors)
    tensors, scales = split_scales(tensors)
    check_dtypes(tensors, scales)
    tensors = conv_patch_embedding(tensors)
    sizes = read_sizes(tensors)
    tensors, proj_l = split_proj_l(tensors, sizes.num_layers)
    check_shapes(tensors, wan_shapes(sizes))
    check_values(small_tensors(tensors, scales, proj_l), progress)
    return Checkpoint(tensors, scales, proj_l, **vars(sizes), layer_settings=settings)


def int8_in_file(
    module: str, weight: torch.Tensor, weight_scale: torch.Tensor
) -> dict[str, torch.Tensor]:
    """An INT8 weight, in memory `module`.weight and .weight_scale, as a file names its tensors."""
    return {f"{module}.int8_weight": weight, f"{module}.scale": weight_scale}


def file_tensors(checkpoint: Checkpoint, names: str) -> dict[str, torch.Tensor]:
    """The tensors of `checkpoint` as a file holds them; nothing is copied.

    Args:
        names: "official", exactly as TurboDiffusion's own files have them; "comfy" differs in one
            shape, patch_embedding.weight [dim, in, 1, 2, 2], so that ComfyUI's own loader takes a
            float checkpoint too. INT8 weights keep their official names in both: under ".weight"
            that loader would take the integers for values.

    Raises:
        ValueError: unknown names.
        CheckpointError: the official names have no place for one scale per output channel, nor
            for ComfyUI's settings of single layers.
    """
    if names not in NAMES:
        raise ValueError(f"names must be one of {', '.join(NAMES)}, got {names!r}")
    if names == "official" and checkpoint.layer_settings:
        raise CheckpointError(
            f"{next(iter(checkpoint.layer_settings))} is a setting of ComfyUI's, which the "
            "official files have no place for: choose the names comfy"
        )
    tensors = dict(checkpoint.layer_settings)
    for name, tensor in checkpoint.tensors.items():
        if name.removesuffix(".weight") not in checkpoint.scales:
            tensors[name] = tensor
    for module, scale in checkpoint.scales.items():
        if names == "official" and scale.ndim != 2:
            raise CheckpointError(
                f"{module}.scale is one per output channel, which the official files have no place "
                f"for, got shape {list(scale.shape)}: choose the names comfy"
            )
        tensors |= int8_in_file(module, checkpoint.tensors[f"{module}.weight"], scale)
    for index, (weight, bias) in enumerate(checkpoint.proj_l):
        tensors[f"blocks.{index}.{PROJ_L}.weight"] = weight
        tensors[f"blocks.{index}.{PROJ_L}.bias"] = bias
    if names == "official":
        weight = tensors["patch_embedding.weight"]
        tensors["patch_embedding.weight"] = rearrange(weight, "dim c kt kh kw -> dim (c kt kh kw)")
    return tensors
