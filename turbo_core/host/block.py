"""The fused transformer block: Wan's block in INT8, every activation quantized once.

Stands in for WanAttentionBlock.forward of ComfyUI's model, and steps aside for it, with the reason
in the run's log line, wherever it could not honour what is there.
"""

import functools

import comfy.model_management
import torch
from comfy.ldm.wan.model import WanAttentionBlock, WanT2VCrossAttention

from ...kernels.checks import HEAD_DIMS
from ...kernels.int8_linear import int8_linear
from ...kernels.norm import rms_norm
from ...kernels.norm_quant import layer_norm_quant
from .. import run_report
from ..activation_memory import part_length
from . import per_run
from .cross_attention import attend_to_text, attends_itself
from .epilogue import quantize
from .gradients import GRADIENTS, records_graph
from .int8_tensor import is_int8
from .once import once
from .operations import Linear, int8_product, int8_weights
from .options import SPLIT, TEXT
from .patch_owner import is_ours, is_stock
from .prefetch import next_block
from .self_attention import attend, missing_parts
from .split_block import split_attend
from .text import KeysValues
from .versions import unrecorded
from .weights import float32_weights


# torch.compile traces the host's part only. Of ours it would freeze decisions made from options,
# whose guards newer hosts drop, and round otherwise than the kernels do.
@torch.compiler.disable(recursive=False)
def block_forward(block, index, x, e, freqs, context, transformer_options=None, **others):
    """WanAttentionBlock.forward of block `index`: x [B, L, C] with modulation e [B, (1,) 6, C].

    `freqs` is the host's rotation [1, L, 1, D/2, 2, 2], `context` the text features [B, T, C];
    `others` are what only the host's own forward takes.
    """
    transformer_options = transformer_options or {}
    y = _unless_it_steps_aside(block, index, x, e, freqs, context, transformer_options)
    if y is not None:
        return y
    others["transformer_options"] = transformer_options
    return type(block).forward(block, x, e=e, freqs=freqs, context=context, **others)


@torch.compiler.disable
def _unless_it_steps_aside(
    block, index, x, e, freqs, context, transformer_options
) -> torch.Tensor | None:
    """The block run fused, or None where the host's forward has to; either way told the report."""
    next_block(transformer_options, block, x.device)
    recorded = records_graph(block, x, e, context)
    reason = GRADIENTS if recorded else why_not_fused(block, e, transformer_options)
    if reason is not None:
        run_report.note_unfused(index, reason)
        return None
    run_report.note_fused(index)
    with unrecorded():
        return _fused(block, index, x, e, freqs, context, transformer_options)


def _fused(block, index, x, e, freqs, context, transformer_options):
    text = transformer_options.get(TEXT, KeysValues)()
    # Not as attributes: those of a module take ten times as long to find, and this is every block.
    parts = block._modules
    attn, cross_attn, ffn = parts["self_attn"], parts["cross_attn"], parts["ffn"]._modules
    modulation = _modulation(block, e, x.device, transformer_options)
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    granularity, eps, dtype = ffn["0"].granularity, block.eps, x.dtype
    split = transformer_options.get(SPLIT)
    x = x if split is None else split.tokens_into(index, x)
    x = x.contiguous()  # the first block gets the patch embedding channels first; then no copy

    def project(op, n, out, **squares):
        return int8_product(op, n, dtype, out=out, **squares)  # [B, L, C]

    def normed():
        return layer_norm_quant(x, granularity, scale=scale1, shift=shift1, eps=eps)

    if split is None:
        y = attend(attn, index, x, normed, project, freqs, transformer_options)
        y = quantize(y, granularity)
    else:
        y = split_attend(attn, index, x, normed, granularity, freqs, transformer_options)
    x = int8_product(attn._modules["o"], y, dtype, gate=gate1, residual=x)
    del y

    linears = cross_attn._modules
    weight, bias = float32_weights(parts["norm3"], x.device)
    q = torch.empty_like(x)  # before what it is made of, see activation_memory.py
    n = layer_norm_quant(x, granularity, weight=weight, bias=bias, eps=eps)
    itself = attends_itself(cross_attn, text, transformer_options)
    projected = project(linears["q"], n, q, squares=itself)
    squares = projected[1] if itself else None
    del n, projected
    if squares is None:
        q = rms_norm(q, float32_weights(linears["norm_q"], x.device)[0], cross_attn.eps)
    y = attend_to_text(
        cross_attn, index, q, squares, granularity, context, text, transformer_options
    )
    del q
    y = quantize(y, granularity)
    int8_product(linears["o"], y, dtype, residual=x, out=x)
    del y

    up, down = int8_weights(ffn["0"], dtype, x.device), None
    at_once = part_length(*x.shape[:2], ffn["0"].out_features)
    for part in (x,) if at_once >= x.shape[1] else x.split(at_once, dim=1):
        n = layer_norm_quant(part, granularity, scale=scale2, shift=shift2, eps=eps)
        h = int8_linear(*n, *up, dtype)
        del n
        # Not before: where it is streamed, it comes while the GPU is at the first product.
        down = down or int8_weights(ffn["2"], dtype, x.device)
        h = quantize(h, granularity, activation="gelu_tanh")
        int8_linear(*h, *down, dtype, gate=gate2, residual=part, out=part)
        del h
    return x


def _modulation(block, e, device, transformer_options: dict) -> tuple[torch.Tensor, ...]:
    """Shift, scale and gate of both halves, float32 [B, 1, C] each."""
    e = once(transformer_options, "modulation", e, lambda e: e.reshape(-1, 6, e.shape[-1]).float())
    own = block._parameters["modulation"]
    if own.device != device or own.itemsize == 1:
        cast = functools.partial(comfy.model_management.cast_to, own, torch.float32, device)
        # Each copy from RAM would wait for all that the GPU was asked for.
        own = per_run.made((block, device), cast)
    return (own + e).chunk(6, dim=1)  # with float32 the sum is taken in it


def why_not_fused(block, e, transformer_options: dict) -> str | None:
    """What keeps a block from running fused; None where nothing does."""
    if reason := _other_kind(block):
        return reason
    attn = block._modules["self_attn"]
    if e.ndim == 4 and e.shape[1] != 1:
        return "timesteps differ between tokens"
    if transformer_options.get("patches", {}).keys() & {"attn1_patch", "attn2_patch"}:
        return "a node patches its attention"
    if not is_ours(attn.forward):
        return "a node patches its self-attention"
    if reason := _other_parts(block):
        return reason
    if not all(map(is_stock, _parts(block))):
        return "a node patches a part of it"
    return None


def why_never_fused(block) -> str | None:
    """What keeps a block from running fused whatever it is given; None where nothing does."""
    return _other_kind(block) or _other_parts(block)


def _other_kind(block) -> str | None:
    if type(block) is not WanAttentionBlock:
        return f"it is a {type(block).__name__}"
    if type(cross_attn := block._modules["cross_attn"]) is not WanT2VCrossAttention:
        return f"its cross-attention is a {type(cross_attn).__name__}"
    if (head_dim := block.dim // block.num_heads) not in HEAD_DIMS:
        return f"its head_dim is {head_dim}, not 64 or 128"
    return None


def _other_parts(block) -> str | None:
    for name in ("self_attn", "cross_attn"):
        if reason := missing_parts(block._modules[name]):
            return reason
    for linear in _linears(block):
        if not isinstance(linear, Linear) or not is_int8(linear._parameters["weight"]):
            return "its weights are not INT8"
    return None


# Not as attributes: those of a module take ten times as long to find, and this is every block.
def _linears(block) -> list[torch.nn.Module]:
    parts = block._modules
    attn, cross_attn = parts["self_attn"]._modules, parts["cross_attn"]._modules
    ffn = parts["ffn"]._modules
    return [*(attn[n] for n in "qkvo"), *(cross_attn[n] for n in "qkvo"), ffn["0"], ffn["2"]]


def _parts(block) -> list[torch.nn.Module]:
    """All of it but its self-attention, which is patched: by us, or see `why_not_fused`."""
    parts = block._modules
    attn, cross_attn = parts["self_attn"]._modules, parts["cross_attn"]._modules
    norms = attn["norm_q"], attn["norm_k"], cross_attn["norm_q"], cross_attn["norm_k"]
    others = (parts[name] for name in ("cross_attn", "ffn", "norm1", "norm2", "norm3"))
    return [*_linears(block), *norms, *others]
