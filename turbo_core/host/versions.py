"""All that differs between versions of ComfyUI: the newest, and older ones down to 0.3.75.

The rest of the pack is written for the newest host; what an older one does otherwise is told and
made up for here, so that dropping an old host is deleting what says its number. Only the attention
backend that a single layer may ask for (0.40) has its stand-in elsewhere, in layer_settings.py.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable

import comfy.model_management
import comfy.ops
import comfy.quant_ops
import comfy.sd
import comfy_api.latest
import torch

if hasattr(comfy.quant_ops, "LAYOUTS"):  # 0.3.75: a quantized tensor's parameters are a dict

    @dataclasses.dataclass(frozen=True)
    class LayoutParams:
        """The fields of comfy-kitchen's BaseLayoutParams."""

        scale: torch.Tensor
        orig_dtype: torch.dtype
        orig_shape: tuple[int, ...]

    def register_layout(name, layout):
        class WithDicts(layout):
            @classmethod
            def quantize(cls, tensor, **options):
                q, params = layout.quantize(tensor, **options)
                return q, _as_dict(params)

            @staticmethod
            def dequantize(qdata, scale, orig_dtype):
                params = layout.Params(scale, orig_dtype, tuple(qdata.shape))
                return layout.dequantize(qdata, params)

        comfy.quant_ops.LAYOUTS[name] = WithDicts
        return name

    def _as_dict(params):
        return {"scale": params.scale, "orig_dtype": params.orig_dtype}

    def quantized_tensor(kind, q, layout, params):
        return kind(q, layout, _as_dict(params))

    def layout_of(weight):
        return weight._layout_type

    def scale_of(weight):
        return weight._layout_params["scale"]

    def float_dtype_of(weight):
        return weight._layout_params["orig_dtype"]

else:  # an object of comfy-kitchen's
    from comfy_kitchen.tensor.base import BaseLayoutParams as LayoutParams

    def register_layout(name: str, layout: type) -> object:
        """Tell the host of a layout of quantized tensors, written as comfy-kitchen has them.

        Returns:
            What register_layout_op files an operation on such tensors under.
        """
        comfy.quant_ops.register_layout_class(name, layout)
        return layout

    def quantized_tensor(
        kind: type, q: torch.Tensor, layout: str, params: LayoutParams
    ) -> torch.Tensor:
        """A `kind` of the host's QuantizedTensor around the integers `q`; no copy."""
        return kind(q, layout, params)

    def layout_of(weight: torch.Tensor) -> str:
        """The name of a quantized tensor's layout."""
        return weight._layout_cls

    def scale_of(weight: torch.Tensor) -> torch.Tensor:
        """The scales of a quantized tensor."""
        return weight._params.scale

    def float_dtype_of(weight: torch.Tensor) -> torch.dtype:
        """What a quantized tensor dequantizes to."""
        return weight._params.orig_dtype


# What cast_bias_weight is asked for so that an INT8 weight is INT8 again once a LoRA is added to
# it. 0.3.75 has no such argument: it asks the op for that, in set_weight.
_known = inspect.signature(comfy.ops.cast_bias_weight).parameters
REQUANTIZED = {"want_requant": True} if "want_requant" in _known else {}

# The key of the APPLY_MODEL wrapper that compiles a model.
COMPILED = "torch.compile"

# What a host with dynamic VRAM keeps in an op whose weights it moves by itself; 0.3.75 has none.
MANAGED = "_v"

# The activations that the host may ask a Linear for, by name; none in 0.3.75.
INPUT_ACTIVATIONS: dict[str, Callable] = getattr(comfy.ops, "INPUT_ACT_EAGER", {})


def is_out_of_memory(error: Exception) -> bool:
    """Whether the host takes `error` for the GPU's memory having run out: torch's own, and in newer
    hosts also what the driver says of it, which may come later. 0.3.75 knows the first only."""
    management = comfy.model_management
    if hasattr(management, "is_oom"):
        return management.is_oom(error)
    return isinstance(error, management.OOM_EXCEPTION)


def has_scaled_weight(op: torch.nn.Module) -> bool:
    """Whether the weight of a comfy op is fp8 with a scale beside it: only in 0.3.75.

    Newer hosts have it in a quantized tensor.
    """
    return getattr(op, "scale_weight", None) is not None


try:
    from comfy.model_prefetch import pause_malloc_graph  # 0.35
except ImportError:  # older hosts record nothing
    pause_malloc_graph = contextlib.nullcontext


try:
    from comfy.model_prefetch import make_prefetch_queue, prefetch_queue_pop
except ImportError:  # 0.3.75

    def make_prefetch_queue(queue: list, device, transformer_options: dict) -> None:
        """This host has no queue."""

    prefetch_queue_pop = None


# (open file, lock, offset, size): where the host finds a storage's bytes; 0.3.75 always maps.
file_slice = getattr(getattr(comfy, "memory_management", None), "TensorFileSlice", None)


def unrecorded() -> contextlib.AbstractContextManager:
    """A context whose allocations ComfyUI's compiler (0.35) leaves out of its plan; no nesting.

    It records what a model allocates in one forward pass and replays that plan in the next. Kernels
    that are compiled and loaded at their first use, and what `once` keeps from one block to the
    next, do not come again, and would break the plan.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return pause_malloc_graph()


def load_diffusion_model(state_dict: dict, model_options: dict, disable_dynamic: bool):
    """The MODEL that the host builds around `state_dict`; empties it.

    Only a host with dynamic VRAM asks for a model without; 0.3.75 does not know the argument.
    """
    asked = {"disable_dynamic": True} if disable_dynamic else {}
    return comfy.sd.load_diffusion_model_state_dict(
        state_dict, model_options=model_options, **asked
    )


def to_add_a_lora_to(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of an INT8 `weight` on `device` as the host makes it before it adds a LoRA.

    It dequantizes to the dtype of these sums; in 0.3.75 always float32.
    """
    management = comfy.model_management
    known = hasattr(management, "lora_compute_dtype")
    dtype = management.lora_compute_dtype(device) if known else torch.float32
    return management.cast_to_device(weight, device, dtype, copy=True)


def loader_of(model) -> tuple | None:
    """How the host loads a MODEL again, as (function, arguments, ...); 0.3.75 knows ours only."""
    return getattr(model, "cached_patcher_init", None)


def carry_loader(original, clone) -> None:
    """Tell a clone how its model is loaded; newer hosts do so themselves."""
    clone.cached_patcher_init = loader_of(original)


def clone_into(model, fresh):
    """A clone of `model` around the weights of `fresh`, a patcher that nobody has loaded yet."""
    if hasattr(fresh, "get_clone_model_override"):
        clone = model.clone(model_override=fresh.get_clone_model_override())
    else:  # 0.3.75
        clone = model.clone()
        for name in ("model", "backup", "object_patches_backup", "pinned"):
            setattr(clone, name, getattr(fresh, name))
    if hasattr(fresh, "clone_base_uuid"):  # not in 0.3.75
        clone.clone_base_uuid = fresh.clone_base_uuid
    return clone


def with_hooks(model):
    """`model` as a patcher that takes hooks. With dynamic VRAM, not in 0.3.75, that is another."""
    if hasattr(model, "get_non_dynamic_delegate"):
        return model.get_non_dynamic_delegate()
    return model


def share_latent_shapes(running: torch.nn.Module, other: torch.nn.Module) -> None:
    """Tell `other` what the host tells the model of a sampler run; 0.3.75 tells neither."""
    if hasattr(running, "latent_shapes"):
        other.latent_shapes = running.latent_shapes


def has_dynamic_vram() -> bool:
    """Whether the host manages the GPU's memory page by page; 0.3.75 does not."""
    memory = getattr(comfy, "memory_management", None)
    return getattr(memory, "aimdo_enabled", False)


def is_dynamic(model) -> bool:
    """Whether the host moves the weights of `model` page by page; None and 0.3.75's it does not."""
    return hasattr(model, "is_dynamic") and model.is_dynamic()


def give_way(model) -> None:
    """Let the GPU's pages go to other models' weights rather than to those of `model`, which is
    streamed where it has none; only where a host with dynamic VRAM has loaded it."""
    room = getattr(model.model, "dynamic_vbars", {}).get(model.load_device)
    if room is not None:
        room.deprioritize()


def keep_pages(model, size: float) -> None:
    """Let the weights of `model` have so many bytes of the GPU's pages at most, the first ones and
    whole pages, until it is loaded again; the host streams the others. Only where one with dynamic
    VRAM has loaded it, and knows how."""
    room = getattr(model.model, "dynamic_vbars", {}).get(model.load_device)
    if hasattr(room, "set_watermark"):
        room.set_watermark(int(size))


def known_fields(schema: type, fields: dict) -> dict:
    """The `fields` of a node's `schema` that the host knows: 0.3.75 lacks some search aids."""
    known = inspect.signature(schema).parameters
    newer = {"search_aliases", "essentials_category"} - known.keys()
    return {name: value for name, value in fields.items() if name not in newer}


async def offer_replacement(fields: dict) -> None:
    """Tell the host of a node that can stand for a missing one; 0.3.75 asks for none."""
    if hasattr(comfy_api.latest.io, "NodeReplace"):
        replacement = comfy_api.latest.io.NodeReplace(**fields)
        await comfy_api.latest.ComfyAPI().node_replacement.register(replacement)


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """A context whose current GPU is `device`; 0.3.75 knows one GPU only."""
    if hasattr(comfy.model_management, "cuda_device_context"):
        return comfy.model_management.cuda_device_context(device)
    return contextlib.nullcontext()


def pixels_dtype(vae) -> torch.dtype:
    """What a VAE gives pixels and latents in; always float32 in 0.3.75."""
    return vae.vae_output_dtype() if hasattr(vae, "vae_output_dtype") else torch.float32
