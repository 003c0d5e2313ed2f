"""A MODEL rebuilt: the same kind of Wan model around other tensors, with all that it carries."""

import types

import torch
from comfy.patcher_extension import WrappersMP

from ..sla_settings import SLASettings
from .layer_settings import layer_settings, set_layer_settings
from .operations import Linear, TurboOperations
from .options import ATTENTION, EXPERT_SWITCH, PROJECTIONS
from .patch import patch_attention
from .patch_owner import is_ours, owner_of
from .projections import own_projection, projection
from .versions import clone_into

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
COMPILED = "torch.compile"  # the key of ComfyUI's wrapper

Tensors = dict[str, torch.Tensor]


def require_nothing_tied(model) -> None:
    """Refuse what holds on to the modules of `model`, and so to its float weights.

    Raises:
        ValueError: there is such a patch.
    """
    if EXPERT_SWITCH in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
        raise ValueError(
            "this MODEL is two experts, got one from Wan22ExpertSwitch. Quantize each expert by "
            "itself, before Wan22ExpertSwitch"
        )
    if model.wrappers.get(WrappersMP.APPLY_MODEL, {}).get(COMPILED):
        raise _tied("torch.compile")
    if model.additional_models.get("multigpu"):
        raise _tied("copies for more GPUs")
    for key in model.injections:
        if key != PROJECTIONS:
            raise _tied(f"{key} (a LoRA in bypass mode, say)")
    modules = set(map(id, model.model.modules()))
    for name, patch in model.object_patches.items():
        inside = name.split(".")[0] == "diffusion_model"
        if not inside or not callable(patch) or is_ours(patch) or _has_no_weights(patch):
            continue
        if id(_bound_to(patch)) not in modules:
            raise _tied(f"{name} by {owner_of(patch)}")


def _has_no_weights(patch) -> bool:
    """Whether `patch` is a module that holds settings only, as a LoRA brings for an attention."""
    is_module = isinstance(patch, torch.nn.Module)
    return is_module and not any(True for _ in (*patch.parameters(), *patch.buffers()))


def _tied(what: str) -> ValueError:
    return ValueError(
        f"this MODEL has a patch that is tied to its float weights, got {what}. Put W8A8Quantize "
        "before the node that adds it"
    )


def _bound_to(patch) -> object:
    """What `patch` is a method of; None where it is a plain function, a module or a value."""
    return patch.__self__ if isinstance(patch, types.MethodType) else None


def rebuilt(model, tensors: Tensors, granularity: str):
    """A new MODEL like `model` around `tensors`, the names of its diffusion model.

    INT8 linears multiply in `granularity`, "rows" or "blocks". Patches, options, wrappers and
    callbacks are carried over; see require_nothing_tied for what cannot be.

    Raises:
        ValueError: `tensors` are not those of such a model.
    """
    return _carried_over(model, _built(model.model, tensors, granularity))


def float_dtype(model: torch.nn.Module) -> torch.dtype:
    """What the float weights are in, or are computed in where they are stored in 8 bits."""
    dtype = model.get_dtype()
    return dtype if dtype in FLOATS else model.manual_cast_dtype


def _built(original: torch.nn.Module, tensors: Tensors, granularity: str) -> torch.nn.Module:
    """The host's model of the kind of `original` around `tensors`."""
    config = type(original.model_config)(original.model_config.unet_config)
    config.set_inference_dtype(float_dtype(original), original.manual_cast_dtype)
    config.custom_operations = TurboOperations
    built = config.get_model({}, "")
    missing, unexpected = built.diffusion_model.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"this MODEL is not built as ComfyUI's {type(built.diffusion_model).__name__}, got "
            f"{len(unexpected)} tensors too many and {len(missing)} too few "
            f"({(unexpected + missing)[0]}). Put W8A8Quantize before the node that changed it"
        )
    built.to(next(iter(tensors.values())).device)  # not before: with dynamic VRAM some is on meta
    originals = original.diffusion_model.blocks
    for block, old in zip(built.diffusion_model.blocks, originals, strict=True):
        if (proj_l := own_projection(old.self_attn)) is not None:
            copies = (t.detach().to(t.device, copy=True) for t in (proj_l.weight, proj_l.bias))
            block.self_attn.proj_l = projection(*copies)
    for module in built.diffusion_model.modules():
        if isinstance(module, Linear):
            module.granularity = granularity
    wan = original.diffusion_model
    set_layer_settings(built.diffusion_model, layer_settings(wan, wan.get_submodule))
    return built


def _carried_over(model, base: torch.nn.Module):
    """A patcher around `base` with everything that `model` carries."""
    quantized = _clone_around(model, base)
    names = {id(module): name for name, module in model.model.named_modules()}
    for name, patch in quantized.object_patches.items():
        if id(_bound_to(patch)) in names:
            twin = base.get_submodule(names[id(_bound_to(patch))])
            quantized.object_patches[name] = types.MethodType(patch.__func__, twin)
    settings = quantized.model_options["transformer_options"].get(ATTENTION, {"attention": "dense"})
    return patch_attention(quantized, SLASettings(**settings))


def _clone_around(model, base: torch.nn.Module):
    """A clone of `model` whose model is `base`."""
    fresh = type(model)(base, model.load_device, model.offload_device)
    clone = clone_into(model, fresh)
    for name in ("hook_backup", "cached_hook_patches", "current_hooks"):
        setattr(clone, name, getattr(fresh, name))
    clone.size, clone.parent, clone.is_injected = 0, None, False
    return clone
