"""Sparse-linear attention inside ComfyUI's own Wan model, through ModelPatcher."""

import dataclasses

import comfy.ldm.wan.model
import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..kernels.dispatch import has_fp8, use_triton
from ..kernels.norm import rms_norm
from ..kernels.rope import apply_rope
from ..kernels.sla import sla
from . import run_report
from .sla_settings import SLASettings

KEY = "turbodiffusion"


def wan_model(model: comfy.model_patcher.ModelPatcher) -> comfy.ldm.wan.model.WanModel:
    """The Wan transformer inside `model`.

    Raises:
        ValueError: the MODEL is something else.
    """
    diffusion_model = model.get_model_object("diffusion_model")
    if not isinstance(diffusion_model, comfy.ldm.wan.model.WanModel):
        raise ValueError(
            f"this needs a Wan MODEL, got {type(diffusion_model).__name__}. "
            "Connect a Wan 2.1 or 2.2 model, from TurboLoader or any other loader."
        )
    return diffusion_model


def patch_attention(model: comfy.model_patcher.ModelPatcher, settings: SLASettings):
    """A clone of `model` whose self-attention follows `settings`; `model` itself is untouched.

    Raises:
        ValueError: not a Wan MODEL.
        RuntimeError: a backend was asked for by name that cannot run here.
    """
    wan_model(model)
    if settings.attention != "dense":
        use_triton("SLA", settings.backend, torch.empty(0, device=model.load_device))
    patched = model.clone()
    patched.model_options["transformer_options"][KEY] = dataclasses.asdict(settings)
    _bind_blocks(patched)
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, _around_run),
        (WrappersMP.DIFFUSION_MODEL, _around_forward),
    ):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    if not patched.callbacks.get(CallbacksMP.ON_CLONE, {}).get(KEY):
        patched.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _rebind_clone)
    return patched


def _bind_blocks(model: comfy.model_patcher.ModelPatcher) -> None:
    """Put our forward on every block's self-attention that nobody else has patched."""
    for index, block in enumerate(wan_model(model).blocks):
        name = f"diffusion_model.blocks.{index}.self_attn.forward"
        if name not in model.object_patches or _is_ours(model.object_patches[name]):
            model.add_object_patch(name, _bind(block.self_attn, index))


def _rebind_clone(original, clone) -> None:
    # A clone for another device or for torch.compile has its own copy of the model.
    if clone.model is not original.model:
        _bind_blocks(clone)


def _bind(attn: torch.nn.Module, index: int):
    def forward(x, freqs, transformer_options):
        return self_attention(attn, index, x, freqs, transformer_options)

    forward.turbodiffusion = True
    return forward


def _is_ours(forward) -> bool:
    return getattr(forward, "turbodiffusion", False)


def _around_run(executor, *args, **kwargs):
    with run_report.run():
        return executor(*args, **kwargs)


def _around_forward(
    executor, x, timestep, context, clip_fea=None, concat=None, transformer_options=None, **kwargs
):
    """Tell the blocks which step this is, and the report which blocks will not reach us."""
    blocks = executor.class_obj.blocks
    run_report.note_forward(len(blocks))
    for index, block in enumerate(blocks):
        if not _is_ours(block.self_attn.forward):
            owner = getattr(block.self_attn.forward, "__module__", "another node")
            run_report.note_dense(index, f"its self-attention is patched by {owner}")
    options = {**transformer_options[KEY], "step": _step(transformer_options)}
    transformer_options = {**transformer_options, KEY: options}
    return executor(x, timestep, context, clip_fea, concat, transformer_options, **kwargs)


def _step(transformer_options: dict) -> int:
    """Index of the current sampling step; -1 outside a sampler or where no step is kept dense."""
    sigmas = transformer_options.get("sample_sigmas")
    if sigmas is None or transformer_options[KEY]["dense_steps"] == 0:
        return -1
    now = transformer_options["sigmas"].max().to(sigmas)
    return int((sigmas > now + 1e-6).sum())


def self_attention(
    attn, index: int, x: torch.Tensor, freqs: torch.Tensor, transformer_options: dict
):
    """Wan self-attention of block `index` on modulated x [B, L, C], with SLA where it applies.

    `freqs` is the host's rotation [1, L, 1, D/2, 2, 2]. Takes the place of
    WanSelfAttention.forward and calls it for blocks and steps that stay dense.
    """
    options = dict(transformer_options[KEY])
    step = options.pop("step", -1)
    settings = SLASettings(**options)
    if why := _dense_reason(settings, attn, index, step):
        run_report.note_dense(index, why)
        return type(attn).forward(attn, x, freqs, transformer_options=transformer_options)

    heads = (*x.shape[:2], attn.num_heads, attn.head_dim)
    cos, sin = freqs[:, :, 0, :, 0, 0], freqs[:, :, 0, :, 1, 0]
    q = apply_rope(_norm(attn.norm_q, attn.q(x)).view(heads), cos, sin)
    k = apply_rope(_norm(attn.norm_k, attn.k(x)).view(heads), cos, sin)
    v = attn.v(x).view(heads)
    y = _sla(attn, q, k, v, settings).flatten(2)
    kernel = run_report.kernel_name(x.device, settings.backend)
    run_report.note_sla(index, _how(settings, x.device, hasattr(attn, "proj_l")), kernel)
    for patch in transformer_options.get("patches", {}).get("attn1_patch", ()):
        y = patch({"x": y, "q": q, "k": k, "transformer_options": transformer_options})
    return attn.o(y)


def _dense_reason(settings: SLASettings, attn, index: int, step: int) -> str | None:
    if settings.attention == "dense" or index in settings.dense_blocks:
        return "asked for"
    if 0 <= step < settings.dense_steps:
        return f"first {settings.dense_steps} steps, asked for"
    if attn.head_dim not in (64, 128):
        return f"head_dim {attn.head_dim} is not 64 or 128"
    return None


def _sla(attn, q, k, v, settings: SLASettings) -> torch.Tensor:
    options = {
        "topk": settings.topk,
        "low_bit": settings.attention == "sagesla",
        "backend": settings.backend,
    }
    if not hasattr(attn, "proj_l"):
        return sla(q, k, v, None, None, **options)
    weight, bias, stream = comfy.ops.cast_bias_weight(
        attn.proj_l,
        dtype=torch.float32,
        device=q.device,
        bias_dtype=torch.float32,
        offloadable=True,
    )
    y = sla(q, k, v, weight, bias, **options)
    comfy.ops.uncast_bias_weight(attn.proj_l, weight, bias, stream)
    return y


def _norm(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the full dim with the checkpoint's fp32 weight, unless somebody patched it."""
    if not isinstance(norm, comfy.ops.CastWeightBiasOp) or "forward" in vars(norm):
        return norm(x)
    weight, bias, stream = comfy.ops.cast_bias_weight(
        norm, dtype=torch.float32, device=x.device, bias_dtype=torch.float32, offloadable=True
    )
    y = rms_norm(x, weight, norm.eps)
    comfy.ops.uncast_bias_weight(norm, weight, bias, stream)
    return y


def _how(settings: SLASettings, device: torch.device, has_projection: bool) -> str:
    """The attention that ran, in a few words for the report."""
    bits = "16 bit"
    if settings.attention == "sagesla":
        bits = f"int8 QK and {'fp8' if has_fp8(device) else 'fp16'} PV"
    branch = "" if has_projection else ", no proj_l so no linear branch"
    return f"{settings.attention} top-k {settings.topk:g} ({bits}{branch})"
