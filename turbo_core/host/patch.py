"""Puts the fused block and SLA into ComfyUI's own Wan model, through ModelPatcher."""

import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable

import comfy.ldm.wan.model
import comfy.model_patcher
import torch
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch.utils.checkpoint import checkpoint

from ...kernels.checks import float32_on_gpu
from ...kernels.dispatch import why_reference
from .. import run_report
from ..sla_settings import SLASettings
from . import pass_graph, per_run, room, text
from .attention_order import settle
from .block import block_forward, why_never_fused
from .in_ram import drop_merged_if_short, keep_pins, let_go
from .memory import out_of_memory_in_words, told_to_the_host
from .options import (
    ATTENTION,
    BLOCKS,
    EXPERT_BOUNDARY,
    MADE_ONCE,
    PINS,
    PREFETCH,
    TEXT,
    THIS_PASS,
)
from .pass_graph import POSITIONAL
from .patch_embedding import rounded_at_once
from .patch_owner import is_ours, mark_as_ours, owner_of
from .prefetch import next_block, queue_of
from .rope import kept_rotation
from .self_attention import self_attention
from .short_memory import around_pass
from .versions import carry_loader

PLAIN_BLOCKS = (
    comfy.ldm.wan.model.WanAttentionBlock,
    comfy.ldm.wan.model.WanAttentionBlockAudio,
)


def require_model(model: object, name: str = "model") -> None:
    """Require a MODEL: the host takes any value for one that a client writes in place of a link.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(model, comfy.model_patcher.ModelPatcher):
        raise ValueError(
            f"{name} must be a MODEL, got the {type(model).__name__} {reprlib.repr(model)}. Link "
            "it to a loader such as TurboLoader."
        )


def wan_model(model: comfy.model_patcher.ModelPatcher) -> comfy.ldm.wan.model.WanModel:
    """The Wan transformer inside `model`.

    Raises:
        ValueError: the MODEL is something else.
    """
    require_model(model)
    diffusion_model = model.get_model_object("diffusion_model")
    if not isinstance(diffusion_model, comfy.ldm.wan.model.WanModel) or any(
        _attends_otherwise(block) for block in diffusion_model.blocks
    ):
        raise ValueError(
            "this needs a Wan MODEL with Wan's plain self-attention, got "
            f"{type(diffusion_model).__name__}. Connect a Wan 2.1 or 2.2 model, from TurboLoader "
            "or any other loader."
        )
    return diffusion_model


def _attends_otherwise(block: torch.nn.Module) -> bool:
    # Causal Wan attends through a KV cache, Wan Animate 2 to a pose as well.
    is_wan = isinstance(block, comfy.ldm.wan.model.WanAttentionBlock)
    return is_wan and type(block) not in PLAIN_BLOCKS


def patch_attention(model: comfy.model_patcher.ModelPatcher, settings: SLASettings):
    """A clone of `model` whose self-attention follows `settings`; `model` itself is untouched.

    Raises:
        ValueError: not a Wan MODEL.
        RuntimeError: a backend was asked for by name that cannot run here.
    """
    wan_model(model)
    if settings.attention != "dense":
        dtype = model.model.manual_cast_dtype or model.model.get_dtype()
        sample = torch.empty(0, dtype=dtype, device=model.load_device)
        why_reference("SLA", settings.backend, sample, float32_on_gpu(sample))
    patched = model.clone()
    patched.model_options["transformer_options"][ATTENTION] = dataclasses.asdict(settings)
    _bind_blocks(patched)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, _around_run),
        (WrappersMP.PREPARE_SAMPLING, room.around_loading),
        (WrappersMP.DIFFUSION_MODEL, _around_forward),
    ):
        patched.remove_wrappers_with_key(kind, ATTENTION)
        patched.add_wrapper_with_key(kind, ATTENTION, wrapper)
    for kind, key, callback in (
        (CallbacksMP.ON_CLONE, ATTENTION, _rebind_clone),
        (CallbacksMP.ON_DETACH, ATTENTION, _drop_graph),
        (CallbacksMP.ON_LOAD, PINS, keep_pins),
        (CallbacksMP.ON_DETACH, PINS, drop_merged_if_short),
    ):
        if not patched.callbacks.get(kind, {}).get(key):
            patched.add_callback_with_key(kind, key, callback)
    return patched


def _bind_blocks(model: comfy.model_patcher.ModelPatcher) -> None:
    """Put our forward on every block and its self-attention, unless somebody else patched it."""
    patches = model.object_patches
    for index in range(len(wan_model(model).blocks)):
        block = f"diffusion_model.blocks.{index}"
        for name, function in ((block, block_forward), (f"{block}.self_attn", self_attention)):
            if is_ours(patches.get(f"{name}.forward")):
                del patches[f"{name}.forward"]
            if name not in patches and f"{name}.forward" not in patches:
                # Not from `blocks`: those may be another clone's, which is loaded now.
                module = model.get_model_object(name)
                model.add_object_patch(f"{name}.forward", _bind(function, module, index))


def _rebind_clone(original, clone) -> None:
    carry_loader(original, clone)
    # A clone for another device or for torch.compile has its own copy of the model.
    if clone.model is not original.model:
        _bind_blocks(clone)


def _drop_graph(patcher, unpatch_all) -> None:
    pass_graph.drop(patcher.model.diffusion_model)


def _bind(function, module: torch.nn.Module, index: int):
    def forward(*args, **kwargs):
        if _is_checkpointed(module):
            return checkpoint(function, module, index, *args, use_reentrant=False, **kwargs)
        return function(module, index, *args, **kwargs)

    return mark_as_ours(forward)


def _is_checkpointed(module: torch.nn.Module) -> bool:
    """Whether the host's train node wants the activations of `module` made again for the backward.

    It wraps the module's forward for that, which ours has then taken the place of; but it leaves a
    mark.
    """
    marked = "org_forward" in module.__dict__
    return marked and torch.is_grad_enabled() and is_ours(module.forward)


def _around_run(executor, *args, **kwargs):
    guider = executor.class_obj
    # A scheduled LoRA changes the weights from step to step, as training does.
    same_weights = not (has_hooks(guider.conds) or torch.is_grad_enabled())
    model, shape = guider.model_patcher, args[0].shape
    settle(model.load_device)
    with (
        run_report.run(InterruptProcessingException),
        per_run.keep(same_weights),
        told_to_the_host(model, guider.conds, guider.model_options),
        out_of_memory_in_words(model, shape),
        let_go(model),
    ):
        return executor(*args, **kwargs)


def has_hooks(conds: dict) -> bool:
    """Whether a guider's `conds` bring hooks, which change weights or options during a run."""
    return any(cond.get("hooks") for group in conds.values() for cond in group)


@torch.compiler.disable(recursive=False)  # as block.block_forward
def _around_forward(
    executor, x, timestep, context, clip_fea=None, concat=None, transformer_options=None, **rest
):
    """Tell the blocks what holds in this pass, and the report which blocks will not reach us."""
    network = executor.class_obj
    _report_forward(network.blocks)
    given = dict(zip(POSITIONAL, (x, timestep, context, clip_fea, concat), strict=True))
    with (
        around_pass(x, network, transformer_options),
        kept_rotation(network),
        rounded_at_once(network, x.dtype),
    ):
        return _forward(executor, given | rest, transformer_options)


@torch.compiler.disable(recursive=False)
def _forward(executor, given: dict, transformer_options: dict) -> torch.Tensor:
    network, x = executor.class_obj, given["x"]
    text_of_pass = _text_of_pass(executor, given["context"], x.dtype, transformer_options)
    if not text.will_be_known(network):
        text_of_pass()  # else the first block asks, when the GPU is done with the step before
    ours = {
        THIS_PASS: _this_pass(transformer_options),
        MADE_ONCE: {},
        BLOCKS: network.blocks,
        TEXT: text_of_pass,
    }
    options = {**transformer_options, **ours}
    options[PREFETCH] = queue_of(network, x.device, options)
    out = pass_graph.forward(executor, options, given)
    next_block(options, None, x.device)
    return out


@torch.compiler.disable
def _report_forward(blocks: torch.nn.ModuleList) -> None:
    run_report.note_forward(len(blocks))
    for index, block in enumerate(blocks):
        if not is_ours(block.forward):
            run_report.note_unfused(index, f"it is patched by {owner_of(block.forward)}")
        if not is_ours(block.self_attn.forward):
            owner = owner_of(block.self_attn.forward)
            run_report.note_dense(index, f"its self-attention is patched by {owner}")


@torch.compiler.disable
def _text_of_pass(executor, context, dtype: torch.dtype, transformer_options: dict) -> Callable:
    """What gives a block what this run's blocks have made of the text, where it reaches them as we
    see it; else nothing, anew at each call, as a node may run a block on several texts."""
    if text.may_change(executor, transformer_options):
        return text.KeysValues
    return functools.cache(functools.partial(_keys_values, executor.class_obj, context, dtype))


@torch.compiler.disable
def _keys_values(network: torch.nn.Module, context, dtype: torch.dtype) -> text.KeysValues:
    fused = why_never_fused(network.blocks[0]) is None
    return text.keys_values(network, context, dtype, fused)


@torch.compiler.disable
def _this_pass(transformer_options: dict) -> tuple[SLASettings, int]:
    """The settings, and the step if some steps are kept dense."""
    settings = SLASettings(**transformer_options[ATTENTION])
    return settings, _step(transformer_options) if settings.dense_steps else -1


def _step(transformer_options: dict) -> int:
    """Index of the step among this model's; -1 outside a sampler."""
    sigmas = transformer_options.get("sample_sigmas")
    if sigmas is None:
        return -1
    now = transformer_options["sigmas"].max().to(sigmas)
    own = sigmas < transformer_options.get(EXPERT_BOUNDARY, math.inf)
    return int((own & (sigmas > now + 1e-6)).sum())
