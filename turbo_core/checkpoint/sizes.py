"""The sizes of a Wan transformer, read from names and shapes, and the shapes that follow."""

import itertools
import math
from dataclasses import dataclass

import torch
from einops import rearrange

from .error import CheckpointError
from .names import BLOCK_NAME

Tensors = dict[str, torch.Tensor]

HEAD_DIM = 128
TEXT_DIM = 4096
FREQ_DIM = 256
PATCH = (1, 2, 2)
PATCH_SIZE = math.prod(PATCH)
OUT_CHANNELS = 16
IN_CHANNELS = {16: "text to video", 36: "image to video"}

ATTENTION_LINEARS = tuple(f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo")
BLOCK_LINEARS = (*ATTENTION_LINEARS, "ffn.0", "ffn.2")
# Wan 2.1 image to video has these; TurboDiffusion's models do not, but W8A8Quantize takes any.
IMAGE_LINEARS = ("cross_attn.k_img", "cross_attn.v_img")


@dataclass(frozen=True)
class Sizes:
    """The numbers that define a Wan transformer."""

    dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int


def read_sizes(tensors: Tensors) -> Sizes:
    """The architecture, from names and shapes alone."""
    dim = _dimension(tensors, "head.modulation", ndim=3, axis=2)
    if dim == 0 or dim % HEAD_DIM:
        raise CheckpointError(
            f"head.modulation says dim {dim}, a Wan model's is a multiple of {HEAD_DIM}: choose a "
            "TurboDiffusion checkpoint"
        )
    num_layers = _count_blocks(tensors)
    ffn_dim = _dimension(tensors, "blocks.0.ffn.0.weight", ndim=2, axis=0)
    in_channels = _dimension(tensors, "patch_embedding.weight", ndim=5, axis=1)
    if in_channels not in IN_CHANNELS:
        known = " or ".join(f"{channels} ({task})" for channels, task in IN_CHANNELS.items())
        raise CheckpointError(
            f"is a Wan model with {in_channels} input channels, TurboDiffusion's have {known}: "
            "load this one with ComfyUI's own loader"
        )
    return Sizes(dim, ffn_dim, num_layers, in_channels)


def _dimension(tensors: Tensors, name: str, ndim: int, axis: int) -> int:
    if name not in tensors:
        raise CheckpointError(f"{name} is missing: download or convert the file again")
    if tensors[name].ndim != ndim:
        raise CheckpointError(
            f"{name} must have {ndim} axes, got shape {list(tensors[name].shape)}: choose a "
            "TurboDiffusion checkpoint"
        )
    return tensors[name].shape[axis]


def _count_blocks(tensors: Tensors) -> int:
    found = {match[1] for name in tensors if (match := BLOCK_NAME.match(name))}
    first_gap = next(index for index in itertools.count() if str(index) not in found)
    if not found or first_gap != len(found):
        raise CheckpointError(
            f"block {first_gap} is missing, got {len(found)} blocks: download or convert the file "
            "again"
        )
    return len(found)


def conv_patch_embedding(tensors: Tensors) -> Tensors:
    """View a Linear's patch_embedding.weight [dim, in*4] as Wan's Conv3d [dim, in, 1, 2, 2]."""
    weight = tensors.get("patch_embedding.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] % PATCH_SIZE:
        return tensors
    kt, kh, kw = PATCH
    weight = rearrange(weight, "dim (c kt kh kw) -> dim c kt kh kw", kt=kt, kh=kh, kw=kw)
    return {**tensors, "patch_embedding.weight": weight}


def wan_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Wan model of these sizes has."""
    dim = sizes.dim
    shapes = {
        "patch_embedding.weight": (dim, sizes.in_channels, *PATCH),
        "patch_embedding.bias": (dim,),
        **linear_shapes("text_embedding.0", dim, TEXT_DIM),
        **linear_shapes("text_embedding.2", dim, dim),
        **linear_shapes("time_embedding.0", dim, FREQ_DIM),
        **linear_shapes("time_embedding.2", dim, dim),
        **linear_shapes("time_projection.1", 6 * dim, dim),
        "head.modulation": (1, 2, dim),
        **linear_shapes("head.head", OUT_CHANNELS * PATCH_SIZE, dim),
    }
    for index in range(sizes.num_layers):
        block = _block_shapes(dim, sizes.ffn_dim)
        shapes.update({f"blocks.{index}.{name}": shape for name, shape in block.items()})
    return shapes


def _block_shapes(dim: int, ffn_dim: int) -> dict[str, tuple[int, ...]]:
    shapes = {"modulation": (1, 6, dim), "norm3.weight": (dim,), "norm3.bias": (dim,)}
    for name in ATTENTION_LINEARS:
        shapes.update(linear_shapes(name, dim, dim))
    for attention in ("self_attn", "cross_attn"):
        shapes[f"{attention}.norm_q.weight"] = shapes[f"{attention}.norm_k.weight"] = (dim,)
    return {
        **shapes,
        **linear_shapes("ffn.0", ffn_dim, dim),
        **linear_shapes("ffn.2", dim, ffn_dim),
    }


def linear_shapes(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a Linear [rows, columns] with a bias."""
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
