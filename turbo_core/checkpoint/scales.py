"""INT8 weights and their scales, as different files hold them."""

import torch

from .checks import describe
from .error import CheckpointError
from .names import BLOCK_NAME, renamed
from .sizes import BLOCK_LINEARS, IMAGE_LINEARS

Tensors = dict[str, torch.Tensor]

INT8_BLOCK = 128

# Scales of an int8 X.weight: ComfyUI's ModelSave writes a MODEL of ours so, SGLang the other. Both
# multiply, as the official X.scale does. LightX2V's weight_scale is one per output channel.
SCALES = ("weight_scale", "weight_scale_inv")
COMFYUI_SCALES = (
    *("scale_weight", "comfy_quant", "scaled_fp8"),
    # ComfyUI's W4A8, W6A8 and AWQ files.
    *("weight_s_rel", "weight_s_channel", "weight_codebook", "weight_zeros"),
)


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
    scales = {module: _as_vector(int8[module], scale) for module, scale in scales.items()}
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
        elif part in (*SCALES, *COMFYUI_SCALES):
            raise CheckpointError(f"is quantised in another format, got {name}: {_advice(tensors)}")
    return renamed(tensors, lambda name: names.get(name, name))


def _advice(tensors: Tensors) -> str:
    """What to do with a file of another format, whichever of its tensors was met first."""
    if any(name.rpartition(".")[2] in COMFYUI_SCALES for name in tensors):
        return (
            "load it with ComfyUI's own Load Diffusion Model, whose MODEL the other nodes here "
            "take, or take TurboDiffusion's plain or -quant file"
        )
    return (
        "take a copy that is made for ComfyUI and load it with its own Load Diffusion Model, or "
        "take TurboDiffusion's plain or -quant file"
    )


def _as_vector(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """LightX2V's scales [out, 1], in the float dtype that the weight had, as float32 [out]."""
    return scale.flatten().float() if _is_column(weight, scale) else scale


def _is_column(weight: torch.Tensor, scale: torch.Tensor) -> bool:
    return scale.shape == (len(weight), 1) and len(weight) > 1 and scale.is_floating_point()


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
    if _is_column(weight, scale):
        return
    if scale.dtype != torch.float32 or scale.shape not in (blocks, weight.shape[:1]):
        raise CheckpointError(
            f"{module}.scale must be float32 {list(blocks)}, one per 128x128 block of a weight "
            f"{list(weight.shape)}, or {list(weight.shape[:1])}, one per output channel, got "
            f"{describe(scale)}: convert or download the file again"
        )
