"""Wan's self-attention as SLA: from the host's module and options to kernels/."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import comfy.ops
import torch
from comfy.ldm.modules.attention import optimized_attention

from ...kernels.norm import rms_norm
from ...kernels.qk_prepare import norms_of_squares, prepare
from ...kernels.room import in_whole_blocks
from ...kernels.rope import apply_rope
from ...kernels.sla import Norms, sla, sla_from_projections
from ...kernels.sparse_attention import default_pv, reads_int8_keys
from .. import run_report
from ..activation_memory import values_in_halves
from ..sla_settings import SLASettings
from .gradients import records_graph
from .layer_settings import preferred_attention
from .once import once
from .options import THIS_PASS
from .patch_owner import is_stock
from .versions import unrecorded
from .weights import float32_weights

# What an attention is made of; a host may merge q, k and v into one Linear.
PARTS = {*"qkvo", "norm_q", "norm_k"}

Pair = tuple[torch.Tensor, torch.Tensor]


@torch.compiler.disable(recursive=False)  # as block.block_forward
def self_attention(
    attn, index: int, x: torch.Tensor, freqs: torch.Tensor, transformer_options: dict | None = None
) -> torch.Tensor:
    """WanSelfAttention.forward of block `index` on modulated x [B, L, C], SLA where it applies.

    `freqs` is the host's rotation [1, L, 1, D/2, 2, 2].
    """
    transformer_options = transformer_options or {}
    y = _unless_dense(attn, index, x, freqs, transformer_options)
    if y is not None:
        return y
    return type(attn).forward(attn, x, freqs, transformer_options=transformer_options)


@torch.compiler.disable
def _unless_dense(attn, index: int, x, freqs, transformer_options: dict) -> torch.Tensor | None:
    """SLA where the block attends sparsely, else None, which the report is told."""
    settings, why_dense = choose(attn, index, transformer_options)
    if why_dense:
        run_report.note_dense(index, why_dense)
        return None
    return _sparse(attn, index, settings, x, freqs, transformer_options)


def _sparse(attn, index: int, settings: SLASettings, x, freqs, transformer_options) -> torch.Tensor:
    """SLA on modulated x [B, L, C], from the projections to `o`."""
    if records_graph(attn, x, freqs):  # rounding to INT8 has no gradients
        settings = dataclasses.replace(settings, attention="sla")
    rotation = _rotation(freqs)
    q, k = _norm(attn.norm_q, attn.q(x)), _norm(attn.norm_k, attn.k(x))
    q, k = (apply_rope(y.unflatten(2, _heads(attn)), *rotation) for y in (q, k))
    v = attn.v(x).unflatten(2, _heads(attn))
    with unrecorded():
        y = sla(q, k, v, _projection(attn, x.device), **_sla_options(settings)).flatten(2)
    note_sla(attn, index, settings, x)
    for patch in transformer_options.get("patches", {}).get("attn1_patch", ()):
        y = patch({"x": y, "q": q, "k": k, "transformer_options": transformer_options})
    return attn.o(y)


class SomeHeads(NamedTuple):
    """Of an attention, heads that are computed without the others."""

    channels: slice  # theirs, of all
    total: Callable  # of the `squares` of their q or k, see int8_product, those of all heads


def attend(
    attn,
    index: int,
    x,
    quantized: Callable,
    project: Callable,
    freqs,
    transformer_options: dict,
    some: SomeHeads | None = None,
) -> torch.Tensor:
    """Self-attention of block `index` from its input x [B, L, C] to what goes into `o`, as large.

    For the fused block: `quantized()` gives x as what the layers attn.q, k and v take, and
    `project(op, input, out)` their output, or that of those `some` heads, also with its `squares`,
    see int8_product. Both are called here, keys and values first, so that nothing outlives its use.
    Into an `out` for half of the output, `project` gives one half and then the other.
    """
    settings, why_dense = choose(attn, index, transformer_options)
    rotation = rotation_of(freqs, transformer_options)
    channels = slice(None) if some is None else some.channels
    shape = x.shape[0], freqs.shape[1], len(range(attn.dim)[channels])
    rooms = _rooms(attn, x, shape, None if why_dense else settings, some is None)
    n, parts = quantized(), attn._modules

    def projected(name: str, **squares):
        return project(parts[name], n, rooms.pop(name, None), **squares)

    def heads(name: str) -> torch.Tensor | Iterator[torch.Tensor]:
        y = projected(name)
        return _in_heads(attn, y) if isinstance(y, torch.Tensor) else _all_in_heads(attn, y)

    def with_row_norms(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Those of q or k, and what their rows are normed by, where that is known by now."""
        y, squares = projected(name, squares=True)
        y = _in_heads(attn, y)
        squares = squares if some is None else some.total(y, squares)
        return y, None if squares is None else norms_of_squares(squares, attn.dim, attn.eps)

    def last(y):
        nonlocal n
        n = None
        return y

    weights = [float32_weights(parts[name], freqs.device)[0] for name in ("norm_q", "norm_k")]
    weights = weights if some is None else [weight[channels] for weight in weights]
    norms = Norms(*weights, attn.eps, attn.num_heads)
    if why_dense:
        run_report.note_dense(index, why_dense)
        v = heads("v").flatten(2)
        k = _rotated(norms.k, *with_row_norms("k"), rotation, attn.eps)
        q = _rotated(norms.q, *last(with_row_norms("q")), rotation, attn.eps)
        return host_attention(attn, q, k, v, transformer_options)
    note_sla(attn, index, settings, freqs)
    return sla_from_projections(
        lambda: last(with_row_norms("q")), lambda: with_row_norms("k"), lambda: heads("v"),
        norms, rotation, _projection(attn, freqs.device), **_sla_options(settings),
    ).flatten(2)  # fmt: skip


def _rooms(
    attn, x: torch.Tensor, shape: tuple[int, ...], sparse: SLASettings | None, whole: bool
) -> dict[str, torch.Tensor]:
    """What takes v, k and q of `shape` [B, L, C], of all heads if `whole`: what lives longer comes
    before what it is made of, see activation_memory.py."""
    if sparse is None or sparse.attention == "sla":  # in 16 bits
        widths = dict.fromkeys("vkq", shape[2])
    elif reads_int8_keys(x.device, x.dtype, attn.head_dim, backend=sparse.backend):
        widths = {"k": shape[2]}  # whose memory v takes, and then q
    else:
        widths = {"v": shape[2] // (1 + (whole and values_in_halves(*shape))), "k": shape[2]}
    return {y: in_whole_blocks(*shape[:2], w, x.dtype, x.device) for y, w in widths.items()}


def _in_heads(attn, y: torch.Tensor) -> torch.Tensor:
    return y.view(*y.shape[:2], -1, attn.head_dim)


def _all_in_heads(attn, parts: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    return (_in_heads(attn, part) for part in parts)


def _rotated(
    weight: torch.Tensor, x: torch.Tensor, norms: torch.Tensor | None, rotation: Pair, eps: float
) -> torch.Tensor:
    """A projection x [B, L, H, D], or that of some heads, after RMSNorm and RoPE, [B, L, C]."""
    return prepare(x, weight, *rotation, eps, out=x, row_norms=norms).rows.flatten(2)


def host_attention(attn, q, k, v, transformer_options: dict) -> torch.Tensor:
    """ComfyUI's own attention of q, k, v [B, L, C], as `attn` would call it; C is of any heads."""
    options = {"transformer_options": transformer_options, **preferred_attention(attn)}
    return optimized_attention(q, k, v, heads=q.shape[2] // attn.head_dim, **options)


def missing_parts(attn) -> str | None:
    """Why this pack cannot compute `attn` part by part; None where it can."""
    if attn._modules.keys() >= PARTS:
        return None
    missing = ", ".join(sorted(PARTS - attn._modules.keys()))
    return f"its attention has no {missing} of its own"


def choose(attn, index: int, transformer_options: dict) -> tuple[SLASettings, str | None]:
    """The settings, and why this block stays dense in this step if it does."""
    if THIS_PASS not in transformer_options:
        return SLASettings("dense"), "the host passes this block no options"
    settings, step = transformer_options[THIS_PASS]
    return settings, _dense_reason(settings, attn, index, step)


def _heads(attn) -> tuple[int, int]:
    return attn.num_heads, attn.head_dim


def _rotation(freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, L, D/2] of the host's rotation matrices; views."""
    return freqs[:, :, 0, :, 0, 0], freqs[:, :, 0, :, 1, 0]


def rotation_of(freqs: torch.Tensor, transformer_options: dict) -> Pair:
    """The same as the kernels read them, made once in a pass."""
    return once(transformer_options, "rotation", freqs, _contiguous_rotation)


def _contiguous_rotation(freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines with pairs side by side."""
    cos, sin = _rotation(freqs)
    return cos.contiguous(), sin.contiguous()


def _dense_reason(settings: SLASettings, attn, index: int, step: int) -> str | None:
    if settings.attention == "dense" or index in settings.dense_blocks:
        return "dense attention chosen"
    if 0 <= step < settings.dense_steps:
        return f"chosen for the first {settings.dense_steps} steps"
    if attn.head_dim not in (64, 128):
        return f"head_dim {attn.head_dim} is not 64 or 128"
    return missing_parts(attn)


def _sla_options(settings: SLASettings) -> dict:
    low_bit = settings.attention == "sagesla"
    return {"topk": settings.topk, "low_bit": low_bit, "backend": settings.backend}


def _projection(attn, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weight and bias of proj_l, None where the checkpoint had none."""
    proj_l = attn._modules.get("proj_l")
    return None if proj_l is None else float32_weights(proj_l, device)


def _norm(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the full dim with the checkpoint's fp32 weight, unless somebody patched it."""
    if not isinstance(norm, comfy.ops.CastWeightBiasOp) or not is_stock(norm):
        return norm(x)
    return rms_norm(x, float32_weights(norm, x.device)[0], norm.eps)


def note_sla(attn, index: int, settings: SLASettings, x: torch.Tensor) -> None:
    """Tell the report which attention runs, in a few words."""
    bits = f"int8 QK and {default_pv(x.device)} PV" if settings.attention == "sagesla" else "16 bit"
    branch = "" if "proj_l" in attn._modules else ", no proj_l so no linear branch"
    how = f"{settings.attention} top-k {settings.topk:g} ({bits}{branch})"
    run_report.note_sla(index, how)
