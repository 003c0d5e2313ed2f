"""Wan's self-attention as SLA: from the host's module and options to kernels/."""

import contextlib

import comfy.ops
import torch
from comfy.ldm.modules.attention import optimized_attention

from ..kernels.norm import rms_norm
from ..kernels.rope import apply_rope
from ..kernels.sla import sla, sla_from_projections
from ..kernels.sparse_attention import default_pv
from . import run_report
from .sla_settings import SLASettings

KEY = "turbodiffusion"


def self_attention(
    attn, index: int, x: torch.Tensor, freqs: torch.Tensor, transformer_options: dict
) -> torch.Tensor:
    """WanSelfAttention.forward of block `index` on modulated x [B, L, C], SLA where it applies.

    `freqs` is the host's rotation [1, L, 1, D/2, 2, 2].
    """
    settings, why_dense = _choose(attn, index, transformer_options)
    if why_dense:
        run_report.note_dense(index, why_dense)
        return type(attn).forward(attn, x, freqs, transformer_options=transformer_options)
    rotation = _rotation(freqs)
    q = apply_rope(_norm(attn.norm_q, attn.q(x)).unflatten(2, _heads(attn)), *rotation)
    k = apply_rope(_norm(attn.norm_k, attn.k(x)).unflatten(2, _heads(attn)), *rotation)
    v = attn.v(x).unflatten(2, _heads(attn))
    with _projection(attn, x.device) as projection:
        y = sla(q, k, v, *projection, **_sla_options(settings)).flatten(2)
    _note_sla(attn, index, settings, x.device)
    for patch in transformer_options.get("patches", {}).get("attn1_patch", ()):
        y = patch({"x": y, "q": q, "k": k, "transformer_options": transformer_options})
    return attn.o(y)


def attend(attn, index, q, k, v, freqs, transformer_options: dict) -> torch.Tensor:
    """Self-attention of block `index` from its projections q, k, v [B, L, C], before `o`.

    For the fused block: RMSNorm and RoPE happen in here, SLA or the host's attention follows.
    """
    settings, why_dense = _choose(attn, index, transformer_options)
    norms = float32_weights(attn.norm_q, q.device), float32_weights(attn.norm_k, q.device)
    with norms[0] as (q_weight, _), norms[1] as (k_weight, _):
        if why_dense:
            run_report.note_dense(index, why_dense)
            rotation = _rotation(freqs)
            q = apply_rope(rms_norm(q, q_weight, attn.eps).unflatten(2, _heads(attn)), *rotation)
            k = apply_rope(rms_norm(k, k_weight, attn.eps).unflatten(2, _heads(attn)), *rotation)
            options = {"heads": attn.num_heads, "transformer_options": transformer_options}
            return optimized_attention(q.flatten(2), k.flatten(2), v, **options)
        _note_sla(attn, index, settings, q.device)
        q, k, v = (x.unflatten(2, _heads(attn)) for x in (q, k, v))
        with _projection(attn, q.device) as projection:
            options = {"eps": attn.eps, **_sla_options(settings)}
            weights = q_weight, k_weight, *_rotation(freqs), *projection
            return sla_from_projections(q, k, v, *weights, **options).flatten(2)


def _choose(attn, index: int, transformer_options: dict) -> tuple[SLASettings, str | None]:
    """The settings, and why this block stays dense in this step if it does."""
    options = dict(transformer_options[KEY])
    step = options.pop("step", -1)
    settings = SLASettings(**options)
    return settings, _dense_reason(settings, attn, index, step)


def _heads(attn) -> tuple[int, int]:
    return attn.num_heads, attn.head_dim


def _rotation(freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, L, D/2] of the host's rotation matrices; views."""
    return freqs[:, :, 0, :, 0, 0], freqs[:, :, 0, :, 1, 0]


def _dense_reason(settings: SLASettings, attn, index: int, step: int) -> str | None:
    if settings.attention == "dense" or index in settings.dense_blocks:
        return "asked for"
    if 0 <= step < settings.dense_steps:
        return f"first {settings.dense_steps} steps, asked for"
    if attn.head_dim not in (64, 128):
        return f"head_dim {attn.head_dim} is not 64 or 128"
    return None


def _sla_options(settings: SLASettings) -> dict:
    low_bit = settings.attention == "sagesla"
    return {"topk": settings.topk, "low_bit": low_bit, "backend": settings.backend}


@contextlib.contextmanager
def float32_weights(op, device: torch.device):
    """Weight and bias of a comfy op in float32 on `device`, wherever the host keeps them."""
    options = {"dtype": torch.float32, "bias_dtype": torch.float32, "offloadable": True}
    weight, bias, stream = comfy.ops.cast_bias_weight(op, device=device, **options)
    yield weight, bias
    comfy.ops.uncast_bias_weight(op, weight, bias, stream)


def _projection(attn, device: torch.device):
    """Context of proj_l's weight and bias; of (None, None) where the checkpoint had none."""
    if hasattr(attn, "proj_l"):
        return float32_weights(attn.proj_l, device)
    return contextlib.nullcontext((None, None))


def _norm(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the full dim with the checkpoint's fp32 weight, unless somebody patched it."""
    if not isinstance(norm, comfy.ops.CastWeightBiasOp) or "forward" in vars(norm):
        return norm(x)
    with float32_weights(norm, x.device) as (weight, _):
        return rms_norm(x, weight, norm.eps)


def _note_sla(attn, index: int, settings: SLASettings, device: torch.device) -> None:
    """Tell the report which attention runs, in a few words."""
    bits = f"int8 QK and {default_pv(device)} PV" if settings.attention == "sagesla" else "16 bit"
    branch = "" if hasattr(attn, "proj_l") else ", no proj_l so no linear branch"
    how = f"{settings.attention} top-k {settings.topk:g} ({bits}{branch})"
    run_report.note_sla(index, how, run_report.kernel_name(device, settings.backend))
