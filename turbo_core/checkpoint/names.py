"""The names that Wan's tensors go by in different files, and back to Wan's own."""

import re
from collections.abc import Callable

import torch

from .error import CheckpointError

Tensors = dict[str, torch.Tensor]

PROJ_L = "self_attn.attn_op.local_attn.proj_l"
BLOCK_NAME = re.compile(r"blocks\.(\d+)\.")

# What torch's wrappers add inside names.
WRAPPERS = re.compile(r"(?<![^.])(_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")
# What stands before the names, ended by the one tensor that every Wan model has outside its blocks.
MARKER = re.compile(
    r"((?:(?:net|net_ema|model|diffusion_model|transformer|module)\.)*)"
    r"(head\.modulation|scale_shift_table)"
)
AVERAGED = "net_ema."

# Diffusers' names as FastVideo and as SGLang write them, which never contradict each other.
OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "patch_embedding.proj": "patch_embedding",
    "condition_embedder.text_embedder.fc_in": "text_embedding.0",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.fc_out": "text_embedding.2",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.mlp.fc_in": "time_embedding.0",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.mlp.fc_out": "time_embedding.2",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_modulation.linear": "time_projection.1",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
ATTENTIONS = (("", "self_attn"), ("attn1.", "self_attn"), ("attn2.", "cross_attn"))
PROJECTIONS = {
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out": "o",
    "to_out.0": "o",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
INSIDE = {
    "scale_shift_table": "modulation",
    # Wan's only affine norm, its third by name, comes second in the forward pass.
    "self_attn_residual_norm.norm": "norm3",
    "norm2": "norm3",
    "ffn.fc_in": "ffn.0",
    "ffn.net.0.proj": "ffn.0",
    "ffn.fc_out": "ffn.2",
    "ffn.net.2": "ffn.2",
    "attn1.attn_impl.proj_l": PROJ_L,
    "attn1.local_attn.proj_l": PROJ_L,
    "attn1.attn_op.local_attn.proj_l": PROJ_L,
    **{f"{there}{a}": f"{ours}.{b}" for there, ours in ATTENTIONS for a, b in PROJECTIONS.items()},
}

# Where ComfyUI's ModelSave finds the projections in a MODEL of ours.
IN_A_MODEL = {"self_attn.proj_l": PROJ_L}

# The gates of Video Sparse Attention (arXiv 2505.13389), in FastVideo's names and in others.
VSA_GATE = "gate_compress"

FOREIGN_LAYOUTS = {
    "lora_": "this looks like a LoRA, load it with a LoRA node on top of a model",
    "scale_shift_table": "this looks like a part of a diffusers model, take the whole file or set",
    "condition_embedder": "this looks like a part of a diffusers model, take the whole file or set",
    "self_attn.q.": "this looks like a part of a Wan model, take the whole file",
}


def wan_names(tensors: Tensors) -> Tensors:
    """The diffusion model's tensors under Wan's own names, whatever layout the file has.

    Wrappers and prefixes come off; diffusers' names, as FastVideo and SGLang write them, are
    translated. Tensors outside the model's prefix (a text encoder in the same file, the raw weights
    beside averaged ones in a training file) are left out. No tensor is touched.

    Raises:
        CheckpointError: not a Wan model, or names of two layouts, or a name without a place in Wan.
    """
    plain = renamed(tensors, lambda name: WRAPPERS.sub("", name))
    if gate := next((name for name in plain if VSA_GATE in name), None):
        raise CheckpointError(
            f"is trained for VSA, another sparse attention than SLA, got {gate}: take a copy that "
            "is made for ComfyUI and load it with its own Load Diffusion Model"
        )
    prefixes = [match[1] for name in plain if (match := MARKER.fullmatch(name))]
    if not prefixes:
        raise CheckpointError(_another_architecture(plain))
    prefix = min(prefixes, key=lambda found: (AVERAGED not in found, len(found)))
    model = {n.removeprefix(prefix): t for n, t in plain.items() if n.startswith(prefix)}
    if "head.modulation" not in model:
        return renamed(model, _from_diffusers)
    for name in model:
        if _translated(name, OUTSIDE, INSIDE) not in (None, name):
            raise CheckpointError(
                f"mixes two layouts, got {name} of diffusers beside head.modulation of Wan: "
                "download or convert the file again"
            )
    return renamed(model, lambda name: _translated(name, {}, IN_A_MODEL) or name)


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    """The same tensors with `rename` applied to their names; two of one name are an error."""
    sources = {}
    for name in tensors:
        other = sources.setdefault(rename(name), name)
        if other != name:
            raise CheckpointError(
                f"has {other} and {name}, which mean the same tensor: download or convert the file "
                "again"
            )
    return {name: tensors[source] for name, source in sources.items()}


def _from_diffusers(name: str) -> str:
    wan = _translated(name, OUTSIDE, INSIDE)
    if wan is None:
        raise CheckpointError(
            f"is a diffusers model with {name}, which has no place in TurboDiffusion's Wan: choose "
            "a TurboDiffusion checkpoint (TurboWan...)"
        )
    return wan


def _translated(name: str, outside: dict[str, str], inside: dict[str, str]) -> str | None:
    """`name` with its module, or as a whole, looked up in the table of its place."""
    block = BLOCK_NAME.match(name)
    start, table = (block[0], inside) if block else ("", outside)
    rest = name.removeprefix(start)
    module, _, part = rest.rpartition(".")
    if rest in table:
        return f"{start}{table[rest]}"
    return f"{start}{table[module]}.{part}" if module in table else None


def _another_architecture(tensors: Tensors) -> str:
    hints = (hint for part, hint in FOREIGN_LAYOUTS.items() if any(part in n for n in tensors))
    advice = next(hints, "choose a TurboDiffusion checkpoint (TurboWan...)")
    found = ", ".join(list(tensors)[:3])
    return (
        "is not a complete Wan model: head.modulation (scale_shift_table in diffusers) is missing, "
        f"got {len(tensors)} tensors such as {found}; {advice}"
    )
