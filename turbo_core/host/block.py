"""The fused transformer block: Wan's block in INT8, every activation quantized once.

Stands in for WanAttentionBlock.forward of ComfyUI's model, and steps aside for it, with the reason
in the run's log line, wherever it could not honour what is there.
"""

import comfy.ldm.wan.model
import comfy.model_management
import torch

from ...kernels.int8_linear import int8_linear
from ...kernels.int8_quant import BLOCK
from ...kernels.norm import rms_norm
from ...kernels.norm_quant import layer_norm_quant
from .. import run_report
from .epilogue import Operands, quantize
from .gradients import GRADIENTS, records_graph
from .int8_tensor import is_int8
from .once import once
from .operations import Linear, int8_product, int8_product_and_squares, int8_weights
from .patch_owner import is_ours, is_stock
from .self_attention import attend, host_attention, missing_parts
from .versions import unrecorded
from .weights import float32_weights

# Tokens that go through the feed-forward layers at once: bounds its memory, fills the GPU still.
FFN_TOKENS = 32768


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
    recorded = records_graph(block, x, e, context)
    reason = GRADIENTS if recorded else why_not_fused(block, e, transformer_options)
    if reason is not None:
        run_report.note_unfused(index, reason)
        return None
    run_report.note_fused(index)
    with unrecorded():
        return _fused(block, index, x, e, freqs, context, transformer_options)


def _fused(block, index, x, e, freqs, context, transformer_options):
    # Not as attributes: those of a module take ten times as long to find, and this is every block.
    parts = block._modules
    attn, cross_attn, ffn = parts["self_attn"], parts["cross_attn"], parts["ffn"]._modules
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(block, e, x.device)
    granularity, eps, dtype = ffn["0"].granularity, block.eps, x.dtype
    x = x.contiguous()  # the first block gets the patch embedding channels first; then no copy

    n = layer_norm_quant(x, granularity, scale=scale1, shift=shift1, eps=eps)
    q, k = (int8_product_and_squares(attn._modules[name], n, dtype) for name in "qk")
    v = int8_product(attn._modules["v"], n, dtype)  # [B, L, C]
    del n
    y = attend(attn, index, q, k, v, freqs, transformer_options)
    del q, k, v
    y = quantize(y, granularity)
    x = int8_product(attn._modules["o"], y, dtype, gate=gate1, residual=x)

    linears = cross_attn._modules
    weight, bias = float32_weights(parts["norm3"], x.device)
    n = layer_norm_quant(x, granularity, weight=weight, bias=bias, eps=eps)
    name = f"text in {granularity}"
    text = once(transformer_options, name, context, lambda c: quantize(c, granularity))
    y = _cross_attend(cross_attn, int8_product(linears["q"], n, dtype), text, transformer_options)
    del n
    int8_product(linears["o"], quantize(y, granularity), dtype, residual=x, out=x)
    del y

    up, down = (int8_weights(ffn[name], dtype, x.device) for name in "02")
    for part in x.split(_part_length(x.shape[1]), dim=1):
        n = layer_norm_quant(part, granularity, scale=scale2, shift=shift2, eps=eps)
        h = quantize(int8_linear(*n, *up, dtype), granularity, activation="gelu_tanh")
        int8_linear(*h, *down, dtype, gate=gate2, residual=part, out=part)
    return x


def _part_length(length: int) -> int:
    """Length of even parts of at most FFN_TOKENS, in whole blocks of scales."""
    parts = -(-length // FFN_TOKENS)
    return -(-length // (parts * BLOCK)) * BLOCK


def _modulation(block, e, device) -> tuple[torch.Tensor, ...]:
    """Shift, scale and gate of both halves, float32 [B, 1, C] each."""
    own = comfy.model_management.cast_to(block.modulation, dtype=torch.float32, device=device)
    return (own + e.reshape(-1, 6, e.shape[-1]).float()).chunk(6, dim=1)


def _cross_attend(attn, q, text: Operands, transformer_options) -> torch.Tensor:
    """Attention of the queries q [B, L, C] to the quantized text, by the host's own attention."""
    parts = attn._modules
    k, v = (int8_product(parts[name], text, q.dtype) for name in "kv")
    q = rms_norm(q, float32_weights(parts["norm_q"], q.device)[0], attn.eps)
    k = rms_norm(k, float32_weights(parts["norm_k"], q.device)[0], attn.eps)
    return host_attention(attn, q, k, v, transformer_options)


def why_not_fused(block, e, transformer_options: dict) -> str | None:
    """What keeps a block from running fused; None where nothing does."""
    if type(block) is not comfy.ldm.wan.model.WanAttentionBlock:
        return f"it is a {type(block).__name__}"
    attn, cross_attn, ffn = (block._modules[name] for name in ("self_attn", "cross_attn", "ffn"))
    if type(cross_attn) is not comfy.ldm.wan.model.WanT2VCrossAttention:
        return f"its cross-attention is a {type(cross_attn).__name__}"
    if e.ndim == 4 and e.shape[1] != 1:
        return "timesteps differ between tokens"
    if transformer_options.get("patches", {}).keys() & {"attn1_patch", "attn2_patch"}:
        return "a node patches its attention"
    if not is_ours(attn.forward):
        return "a node patches its self-attention"
    attentions = attn, cross_attn
    if reason := missing_parts(attn) or missing_parts(cross_attn):
        return reason
    linears = [attn._modules[name] for attn in attentions for name in "qkvo"]
    for linear in (*linears, ffn._modules["0"], ffn._modules["2"]):
        if not isinstance(linear, Linear) or not is_int8(linear._parameters["weight"]):
            return "its weights are not INT8"
    norms = [attn._modules[name] for attn in attentions for name in ("norm_q", "norm_k")]
    norms += [block._modules[name] for name in ("norm1", "norm2", "norm3")]
    if not all(map(is_stock, (cross_attn, ffn, *linears, *norms))):
        return "a node patches a part of it"
    return None
