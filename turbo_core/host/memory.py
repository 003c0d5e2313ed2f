"""What a MODEL tells ComfyUI that its activations take, so that no more room is kept free of
weights than that.

ComfyUI asks the model that all clones share, which knows nothing of their patches: so it is told
for the time of a run. Wherever a block may run as the host's own forward, the host's figure holds,
which is for that.
"""

import contextlib
from collections.abc import Callable, Iterator

import comfy.model_base
import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ...kernels.dispatch import triton_unavailable
from ...kernels.sparse_attention import default_pv
from ..activation_memory import Network, fused_bytes, rounding
from ..sla_settings import SLASettings
from .block import why_never_fused
from .gradients import GRADIENTS
from .operations import Linear
from .options import ATTENTION, PROJECTIONS
from .patch_owner import is_ours, mark_as_ours
from .text import PROMPTS
from .versions import is_out_of_memory

SIXTEEN_BITS = (torch.bfloat16, torch.float16)

# Conditions that make the sequence longer, or another pass before this one necessary.
LENGTHENING = {"reference_latents", "context_latents", "time_dim_concat", "control"}


@contextlib.contextmanager
def told_to_the_host(model, conds: dict, model_options: dict) -> Iterator[None]:
    """While this lasts ComfyUI counts with what `model` takes where all its blocks run fused."""
    if why_the_hosts_figure(model, conds, model_options) is not None:
        yield
        return
    attributes, name = vars(model.model), "memory_required"
    before = attributes.get(name)
    attributes[name] = mark_as_ours(_required(model, conds, model_options))
    try:
        yield
    finally:
        if before is None:
            del attributes[name]
        else:
            attributes[name] = before


def is_told(model) -> bool:
    """Whether ComfyUI counts so now for `model`: closely, where its own figure, or that of another
    node, may be far above."""
    return is_ours(vars(model.model).get("memory_required"))


class OutOfMemoryError(torch.OutOfMemoryError):
    """The host's own, in words that help."""


@contextlib.contextmanager
def out_of_memory_in_words(model, shape: torch.Size) -> Iterator[None]:
    """Where a run of `model` with latents of this shape does not fit, it says what it takes.

    Raises:
        OutOfMemoryError: which the host takes for its own.
    """
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        needed = model.model.memory_required(list(shape)) / 1e9
        raise OutOfMemoryError(
            f"the GPU has no room for this video: a forward pass takes about {needed:.1f} GB "
            "beside the weights that are there. Make the video smaller or shorter, or close what "
            f"else uses the GPU. ({error})"
        ) from error


def why_the_hosts_figure(model, conds: dict, model_options: dict) -> str | None:
    """Why a run of `model` may take more than its fused blocks do; None where it does not."""
    settings = _settings(model_options)
    if torch.is_grad_enabled():
        return GRADIENTS
    if type(model.model) is not comfy.model_base.WAN21:
        return f"it is a {type(model.model).__name__}"
    if unavailable := triton_unavailable(model.load_device):
        return unavailable
    if not comfy.model_management.pytorch_attention_enabled():
        return "the host's attention is not torch's"
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    if dtype not in SIXTEEN_BITS or settings.backend == "reference":
        return "kernels that take more memory compute it"
    if any(LENGTHENING & cond.keys() for group in conds.values() for cond in group):
        return "conditions lengthen the sequence"
    if set(model.injections) - {PROJECTIONS}:
        return "a node changes its modules"
    options = model_options["transformer_options"]
    if options.get("patches") or options.get("patches_replace"):
        return "a node patches its blocks"
    if any(options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).values()):
        return "a node wraps it, torch.compile perhaps"
    if any(_changes_a_block(name, patch) for name, patch in model.object_patches.items()):
        return "a node patches its blocks"
    return next(filter(None, map(why_never_fused, model.model.diffusion_model.blocks)), None)


def _changes_a_block(name: str, patch) -> bool:
    is_part = name.startswith("diffusion_model.") and not name.endswith(".comfy_attention")
    return is_part and not is_ours(patch)


def _required(model, conds: dict, model_options: dict) -> Callable[..., int]:
    """What takes the place of BaseModel.memory_required for a run of `model`."""
    wan = model.model.diffusion_model
    network = Network(wan.dim, wan.ffn_dim, wan.num_heads, wan.num_layers)
    settings = _settings(model_options)
    kinds = _attentions(settings)
    fp8 = default_pv(model.load_device) == "fp8"
    every = [cond for group in conds.values() for cond in group]
    texts = [cond["cross_attn"] for cond in every if "cross_attn" in cond]
    longest = max((text.shape[1] for text in texts), default=512)
    linears = (op for op in wan.modules() if isinstance(op, Linear) and op.weight is not None)
    rounded = rounding(op.weight.nbytes for op in linears)

    def memory_required(input_shape, cond_shapes=None):
        batch, _, frames, height, width = input_shape
        tokens = frames * -(-height // 2) * -(-width // 2)
        kept = max(batch, min(len(texts), PROMPTS) * batch)
        sizes = network, batch, tokens
        more = fp8, kept, longest, settings.topk
        return rounded + max(fused_bytes(*sizes, kind, *more) for kind in kinds)

    return memory_required


def _settings(model_options: dict) -> SLASettings:
    return SLASettings(**model_options["transformer_options"][ATTENTION])


def _attentions(settings: SLASettings) -> set[str]:
    """The kinds of attention that blocks run in some step."""
    dense = settings.dense_blocks or settings.dense_steps
    return {settings.attention, "dense"} if dense else {settings.attention}
