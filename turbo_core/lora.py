"""LoRAs for Wan in every spelling that trainers write, under the names that ComfyUI reads.

A tensor's name is a module's, after a prefix, with an ending that says what the tensor is:
`transformer.blocks.0.attn1.to_q` + `.lora_A.weight`. Modules are Wan's own or diffusers', with dots
or with underscores; ComfyUI knows the first and a part of the rest for Wan, and skips the others.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .checkpoint.names import INSIDE, OUTSIDE
from .words import count

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]

NATIVE = "diffusion_model."
# Not `transformer_`: other architectures have their blocks in `transformer_blocks`.
PREFIX = re.compile(
    r"(?:(?:base_model|model|diffusion_model|transformer|pipe|dit|unet|net|module)\."
    r"|(?:lora_transformer|lora_unet|lycoris|lora)[._]+)+"
)
# Diffusers' two experts in one file; the second one's parts are not the first one's.
SECOND_EXPERT = "transformer_2."

# What a tensor is, as files spell it, and as ComfyUI reads it.
ENDINGS = [
    (r"\.lora_([AB])(?:\.\w+)?\.weight", r".lora_\1.weight"),  # PEFT's with its adapter's name
    (r"\.lora_([AB])", r".lora_\1.weight"),
    (r"[._]lora[._](up|down|mid)\.weight", r".lora_\1.weight"),
    (r"\.lora_linear_layer\.(up|down)\.weight", r".lora_\1.weight"),
    (r"\.lora_magnitude_vector(?:\.\w+)?", ".dora_scale"),
    (r"\.(alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|reshape_weight)", r".\1"),
    (r"\.(hada_\w+|lokr_\w+|oft_blocks|rescale|[ab][12]\.weight)", r".\1"),
]
MODULATION = ".diff_m"  # a difference of the parameter called modulation, in its module's name
SCALES = {".alpha", ".dora_scale", ".reshape_weight"}  # that change nothing by themselves
PAIRS = ((".lora_B.weight", ".lora_A.weight"), (".lora_up.weight", ".lora_down.weight"))
MIDDLE = ".lora_mid.weight"  # of a convolution, between halves that need not have one rank
DIFFERENCE = ".diff"

# Wan 2.1's image branch in diffusers' names, which TurboDiffusion's checkpoints do not have.
IMAGE_INSIDE = {
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
}
IMAGE_OUTSIDE = {
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
}

# PEFT's settings, as diffusers puts them into the header of a file.
PEFT_SETTINGS = "lora_adapter_metadata"

# Parts of the names that LoRAs are published under which distill a model to few steps.
DISTILLATIONS = re.compile(
    r"lightx2v|lightning|causvid|fastwan|accvid|self[-_]?forcing|step[-_]?distill|dmd|turbo"
    r"|(?<![a-z])rcm(?![a-z])",
    re.IGNORECASE,
)


@dataclass
class Lora:
    """What a file holds for a model.

    Attributes:
        tensors: under ComfyUI's names, for that model.
        modules: the model's modules that they change, in the file's order.
        example: one name as the file spells it, and the module that it is.
        unmatched: names in the file that no module of the model has.
        misfits: modules that it has something for which does not fit them, and why.
        ranks: of the low-rank pairs.
        scales: alpha / rank of the pairs, 1 where the file has no alpha.
    """

    tensors: Tensors = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    example: tuple[str, str] = ("", "")
    unmatched: list[str] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    scales: set[float] = field(default_factory=set)


def read_lora(tensors: Tensors, shapes: Shapes, settings: dict | None = None) -> Lora:
    """The LoRA that `tensors`, a file's by their names, are for a model.

    Args:
        shapes: of the model's parameters by Wan's names ("blocks.0.self_attn.q.weight").
        settings: PEFT's, see peft_settings, where the file has no alpha of its own.
    """
    lora, groups = Lora(), defaultdict(dict)
    modules = _spellings(shapes)
    has_first = any(name.startswith("transformer.") for name in tensors)
    for name, tensor in tensors.items():
        other_expert = has_first and name.startswith(SECOND_EXPERT)
        module, part = (None, "") if other_expert else _place(name, modules)
        if module is None or part in groups[module]:
            lora.unmatched.append(name)
            continue
        groups[module][part] = tensor
        lora.example = lora.example if lora.example[0] else (name, module)
    for module, parts in groups.items():
        if parts:
            _add(lora, module, parts, shapes, settings or {})
    return lora


def describe(lora: Lora) -> list[str]:
    """What a user wants to know of it, in lines."""
    spelled, module = lora.example
    changed = f"{count(len(lora.modules), 'layer')} changed"
    if lora.ranks:
        changed += f", rank {_span(lora.ranks)}, alpha / rank {_span(lora.scales)}"
    lines = [changed, f"spelling: {spelled} is {module}"] if lora.modules else []
    if lora.misfits:
        module, why = next(iter(lora.misfits.items()))
        misfits = count(len(lora.misfits), "layer does", "layers do")
        lines.append(f"{misfits} not fit this model: {module} {why}")
    if lora.unmatched:
        some = ", ".join(lora.unmatched[:3])
        unmatched = count(len(lora.unmatched), "tensor")
        lines.append(f"{unmatched} without a place in this model: {some}")
    return lines


def peft_settings(metadata: dict[str, str] | None) -> dict:
    """PEFT's settings (r, lora_alpha, use_rslora) out of a file's header; empty without."""
    try:
        found = json.loads((metadata or {}).get(PEFT_SETTINGS, "{}"))
    except (ValueError, RecursionError, TypeError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {name.removeprefix("transformer."): value for name, value in found.items()}


def is_distillation(file_name: str) -> bool:
    """Whether a LoRA of this name distills a model to few steps, as far as a name can tell."""
    return DISTILLATIONS.search(file_name) is not None


def _spellings(shapes: Shapes) -> dict[str, str]:
    """Every spelling of the model's modules, dots as underscores, with Wan's name of it."""
    modules = {name.removesuffix(".weight").removesuffix(".bias") for name in shapes}
    spellings = {_flat(name): name for name in modules}
    for theirs, ours in _diffusers(modules):
        if ours in modules:
            spellings.setdefault(_flat(theirs), ours)
    return spellings


def _diffusers(modules: set[str]) -> Iterator[tuple[str, str]]:
    """Diffusers' name and Wan's of each module that may be there."""
    yield from {**OUTSIDE, **IMAGE_OUTSIDE}.items()
    blocks = {match[0] for name in modules if (match := re.match(r"blocks\.\d+\.", name))}
    for block in blocks:
        for theirs, ours in {**INSIDE, **IMAGE_INSIDE}.items():
            yield f"{block}{theirs}", f"{block}{ours}"


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _place(name: str, modules: dict[str, str]) -> tuple[str | None, str]:
    """Which of `modules` the tensor is for, and what it is, as ComfyUI spells it."""
    if name.endswith(MODULATION):
        name = f"{name.removesuffix(MODULATION)}.modulation.diff"
    for ending, ours in ENDINGS:
        if match := re.fullmatch(f"(.+?)({ending})", name):
            spelled = match[1].replace(SECOND_EXPERT, "transformer.", 1)
            prefix = PREFIX.match(spelled)
            plain = spelled[prefix.end() :] if prefix else spelled
            return modules.get(_flat(plain)), re.sub(ending, ours, match[2])
    return None, ""


def _add(lora: Lora, module: str, parts: Tensors, shapes: Shapes, settings: dict) -> None:
    """One module's tensors, unless they do not fit."""
    if why := _why_not(parts, shapes.get(f"{module}.weight")):
        lora.misfits[module] = why
        return
    down = next((parts[down] for _, down in PAIRS if down in parts), None)
    if down is not None:
        rank = len(down)
        if ".alpha" not in parts and (alpha := _peft_alpha(settings, rank)) is not None:
            parts[".alpha"] = torch.tensor(alpha)
        lora.ranks.add(rank)
        lora.scales.add(parts[".alpha"].item() / rank if ".alpha" in parts else 1.0)
    if ".dora_scale" in parts and parts[".dora_scale"].ndim == 1:
        parts[".dora_scale"] = parts[".dora_scale"].unsqueeze(1)  # PEFT's is a vector
    lora.modules.append(module)
    lora.tensors.update({f"{NATIVE}{module}{part}": tensor for part, tensor in parts.items()})


def _why_not(parts: Tensors, shape: tuple[int, ...] | None) -> str | None:
    """What is wrong with one module's tensors for a weight of this shape; None for no weight."""
    if parts.keys() <= SCALES:
        return "has scales of a LoRA only"
    if ".alpha" in parts and parts[".alpha"].numel() != 1:
        return "has an alpha that is no number"
    for up, down in PAIRS:
        if (up in parts) != (down in parts):
            return "has one half of a LoRA only"
        if up in parts:
            halves = parts[up], parts[down]
            if shape is None or any(half.ndim < 2 or not half.numel() for half in halves):
                return "has a LoRA that is no pair of matrices"
            wanted = [shape[0], math.prod(shape[1:])]
            if (found := [len(halves[0]), halves[1][0].numel()]) != wanted:
                return f"is {wanted}, the LoRA is for {found}"
            ranks = halves[0].shape[1], len(halves[1])
            if ranks[0] != ranks[1] and MIDDLE not in parts:
                return f"has halves of rank {ranks[0]} and {ranks[1]}"
    if shape and DIFFERENCE in parts and parts[DIFFERENCE].shape != shape:
        return f"is {list(shape)}, the difference is for {list(parts[DIFFERENCE].shape)}"
    return None


def _peft_alpha(settings: dict, rank: int) -> float | None:
    """The alpha that ComfyUI divides by the rank; rank-stabilised LoRAs divide by its root."""
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, (int, float)):
        return None
    return float(alpha * math.sqrt(rank) if settings.get("use_rslora") else alpha)


def _span(numbers: set[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
