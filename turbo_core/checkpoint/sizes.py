"""What a Wan checkpoint is made of: names, sizes, INT8 weights with scales, SLA projections."""

import itertools
import json
import math
from dataclasses import dataclass

import torch
from einops import rearrange

from .checks import check_shapes, describe
from .error import CheckpointError
from .names import BLOCK_NAME, PROJ_L, renamed

Tensors = dict[str, torch.Tensor]
Pairs = tuple[tuple[torch.Tensor, torch.Tensor], ...]

HEAD_DIM = 128
INT8_BLOCK = 128
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

# Scales of an int8 X.weight: ComfyUI's ModelSave writes a MODEL of ours so, SGLang the other. Both
# multiply, as the official X.scale does.
SCALES = ("weight_scale", "weight_scale_inv")
FOREIGN_SCALES = (
    *("scale_weight", "comfy_quant", "scaled_fp8"),
    # ComfyUI's W4A8, W6A8 and AWQ files.
    *("weight_s_rel", "weight_s_channel", "weight_codebook", "weight_zeros"),
)

# The attention backend that a layer asks ComfyUI (0.40) for: JSON text in uint8, no weight.
LAYER_SETTING = ".comfy_attention.config"
LONGEST_SETTING = 65536


@dataclass(frozen=True)
class Sizes:
    """The numbers that define a Wan transformer."""

    dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int


def split_settings(tensors: Tensors) -> tuple[Tensors, Tensors]:
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


def split_scales(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Rename X.int8_weight to X.weight and set X.scale apart.

    Returns:
        The tensors without scales, and the scales by module name X: fp32
        [ceil(out/128), ceil(in/128)] (arXiv 2512.16093, W8A8 in 128x128 blocks), or [out].
    """
    tensors = _official_int8(tensors)
    int8 = _by_module(tensors, ".int8_weight")
    scales = _by_module(tensors, ".scale")
    for module in int8:
        _check_pair(module, tensors, scales)
    for module in scales:
        if module not in int8:
            raise CheckpointError(
                f"{module}.scale has no {module}.int8_weight: convert or download the file again"
            )
    weights = {n.replace(".int8_weight", ".weight"): t for n, t in tensors.items()}
    return {n: t for n, t in weights.items() if not n.endswith(".scale")}, scales


def _official_int8(tensors: Tensors) -> Tensors:
    """Int8 X.weight with X.weight_scale or X.weight_scale_inv as X.int8_weight with X.scale."""
    names = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        weight = tensors.get(f"{module}.weight")
        ours = part in SCALES and weight is not None and weight.dtype == torch.int8
        if ours:
            names.update({name: f"{module}.scale", f"{module}.weight": f"{module}.int8_weight"})
        elif part in (*SCALES, *FOREIGN_SCALES):
            raise CheckpointError(
                f"is quantised in another format, got {name}: take TurboDiffusion's plain or "
                "-quant file, or load this one with ComfyUI's own loader"
            )
    return renamed(tensors, lambda name: names.get(name, name))


def _by_module(tensors: Tensors, suffix: str) -> Tensors:
    return {n.removesuffix(suffix): t for n, t in tensors.items() if n.endswith(suffix)}


def _check_pair(module: str, tensors: Tensors, scales: Tensors) -> None:
    parts = BLOCK_NAME.match(module)
    weight = tensors[f"{module}.int8_weight"]
    if parts is None or module[parts.end() :] not in (*BLOCK_LINEARS, *IMAGE_LINEARS):
        wrong = "is not a Linear of a block, TurboDiffusion quantises nothing else"
    elif f"{module}.weight" in tensors:
        wrong = f"stands beside {module}.weight, only one of them can be meant"
    elif module not in scales:
        wrong = f"has no {module}.scale"
    elif weight.dtype != torch.int8 or weight.ndim != 2:
        wrong = f"must be int8 [out, in], got {describe(weight)}"
    else:
        return _check_scale(module, weight, scales[module])
    raise CheckpointError(f"{module}.int8_weight {wrong}: convert or download the file again")


def _check_scale(module: str, weight: torch.Tensor, scale: torch.Tensor) -> None:
    blocks = tuple(-(-n // INT8_BLOCK) for n in weight.shape)
    if scale.dtype != torch.float32 or scale.shape not in (blocks, weight.shape[:1]):
        raise CheckpointError(
            f"{module}.scale must be float32 {list(blocks)}, one per 128x128 block of a weight "
            f"{list(weight.shape)}, or {list(weight.shape[:1])}, one per output channel, got "
            f"{describe(scale)}: convert or download the file again"
        )


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


def split_proj_l(tensors: Tensors, num_layers: int) -> tuple[Tensors, Pairs]:
    """Set SLA's projections apart.

    Returns:
        The tensors without them, and (weight [128, 128], bias [128]) of each block; an empty tuple
        where no block has one.
    """
    shapes = {}
    for index in range(num_layers):
        shapes.update(_linear(f"blocks.{index}.{PROJ_L}", HEAD_DIM, HEAD_DIM))
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


def wan_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Wan model of these sizes has."""
    dim = sizes.dim
    shapes = {
        "patch_embedding.weight": (dim, sizes.in_channels, *PATCH),
        "patch_embedding.bias": (dim,),
        **_linear("text_embedding.0", dim, TEXT_DIM),
        **_linear("text_embedding.2", dim, dim),
        **_linear("time_embedding.0", dim, FREQ_DIM),
        **_linear("time_embedding.2", dim, dim),
        **_linear("time_projection.1", 6 * dim, dim),
        "head.modulation": (1, 2, dim),
        **_linear("head.head", OUT_CHANNELS * PATCH_SIZE, dim),
    }
    for index in range(sizes.num_layers):
        block = _block_shapes(dim, sizes.ffn_dim)
        shapes.update({f"blocks.{index}.{name}": shape for name, shape in block.items()})
    return shapes


def _block_shapes(dim: int, ffn_dim: int) -> dict[str, tuple[int, ...]]:
    shapes = {"modulation": (1, 6, dim), "norm3.weight": (dim,), "norm3.bias": (dim,)}
    for name in ATTENTION_LINEARS:
        shapes.update(_linear(name, dim, dim))
    for attention in ("self_attn", "cross_attn"):
        shapes[f"{attention}.norm_q.weight"] = shapes[f"{attention}.norm_k.weight"] = (dim,)
    return {**shapes, **_linear("ffn.0", ffn_dim, dim), **_linear("ffn.2", dim, ffn_dim)}


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def small_tensors(tensors: Tensors, scales: Tensors, proj_l: Pairs) -> Tensors:
    """The tensors that are cheap to look through: all but the big, memory-mapped weights."""
    small = {n: t for n, t in tensors.items() if t.ndim == 1 or n.endswith("modulation")}
    small.update({f"{module}.scale": scale for module, scale in scales.items()})
    for index, (weight, bias) in enumerate(proj_l):
        small[f"blocks.{index}.{PROJ_L}.weight"] = weight
        small[f"blocks.{index}.{PROJ_L}.bias"] = bias
    return small
