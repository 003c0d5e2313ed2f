"""Attention to the text in the fused block: a prompt's padding is attended to as one key."""

import torch

from ...kernels.norm import rms_norm
from ...kernels.qk_prepare import norms_of_squares
from ...kernels.text_attention import text_attention
from .epilogue import quantize
from .layer_settings import preferred_attention
from .once import once
from .operations import int8_product
from .self_attention import host_attention
from .text import KeysValues
from .weights import float32_weights

OVERRIDE = "optimized_attention_override"  # the host's option: another node's attention


def attends_itself(attn, text: KeysValues, transformer_options: dict) -> bool:
    """Whether `attend_to_text` computes `attn` itself, not by the host's attention.

    Where the text has padding, and nobody asked for another attention.
    """
    if text.repeats == 1 or OVERRIDE in transformer_options:
        return False
    setting = preferred_attention(attn).get("preferred_attention")
    return getattr(setting, "config", None) is None


def attend_to_text(
    attn,
    index: int,
    q,
    squares,
    granularity: str,
    context,
    text: KeysValues,
    transformer_options: dict,
) -> torch.Tensor:
    """Cross-attention of block `index` to the text features `context`, before the layer `o`.

    `text` is what blocks have made of them, to look up and to add to.
    q [B, L, C] is normed already, or its projection with its rows' `squares`, see int8_product;
    these only where `attends_itself`, which may give the result in q's memory.
    """
    k, v = _keys_values(attn, index, granularity, context, text, transformer_options)
    repeats = text.repeats
    if not attends_itself(attn, text, transformer_options):
        k, v = (_with_padding(x, repeats) for x in (k, v))
        return host_attention(attn, q, k, v, transformer_options)
    norm = ()
    if squares is not None:
        weight = float32_weights(attn._modules["norm_q"], q.device)[0]
        norm = weight, norms_of_squares(squares, attn.dim, attn.eps)
    q, k, v = (x.unflatten(2, (-1, attn.head_dim)) for x in (q, k, v))
    return text_attention(q, k, v, repeats, *norm, out=q).flatten(2)


def _keys_values(attn, index, granularity, context, made: KeysValues, transformer_options):
    """k and v [B, T, C] of the text features `context` for block `index`, of padding one row."""
    if index not in made:
        name = f"text in {granularity}"
        rows = context[:, : context.shape[1] - made.repeats + 1]
        text = once(transformer_options, name, context, lambda _: quantize(rows, granularity))
        parts = attn._modules
        k, v = (int8_product(parts[name], text, context.dtype) for name in "kv")
        made.keep(index, rms_norm(k, float32_weights(parts["norm_k"], k.device)[0], attn.eps), v)
    return made[index]


def _with_padding(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """Keys or values [B, T, C] with the last row as often as it counts."""
    return torch.cat([x, x[:, -1:].expand(-1, repeats - 1, -1)], 1) if repeats > 1 else x
