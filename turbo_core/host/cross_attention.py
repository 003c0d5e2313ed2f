"""Attention to the text in the fused block: a prompt's padding is attended to as one key."""

import torch

from ...kernels.norm import rms_norm
from ...kernels.qk_prepare import norms_of_squares
from ...kernels.text_attention import text_attention
from .epilogue import quantize
from .layer_settings import preferred_attention
from .once import once
from .operations import int8_product
from .text import KeysValues
from .weights import float32_weights

OVERRIDE = "optimized_attention_override"  # the host's option: another node's attention


def attends_itself(attn, text: KeysValues, transformer_options: dict) -> bool:
    """Whether `attend_to_text` computes `attn`, and not the host's attention.

    Where the text has padding, and nobody asked for another attention.
    """
    if text.repeats == 1 or OVERRIDE in transformer_options:
        return False
    setting = preferred_attention(attn).get("preferred_attention")
    return getattr(setting, "config", None) is None


def keys_values_of(
    attn, index: int, granularity: str, context, text: KeysValues, itself: bool, options: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v [B, T, C] of the text features `context` for block `index`: found in `text`, or made
    and added to it. Of padding one row where `attend_to_text` takes them, else all of it."""
    if index not in text:
        name = f"text in {granularity}"
        rows = context[:, : context.shape[1] - text.repeats + 1]
        quantized = once(options, name, context, lambda _: quantize(rows, granularity))
        parts = attn._modules
        k, v = (int8_product(parts[name], quantized, context.dtype) for name in "kv")
        text.keep(index, rms_norm(k, float32_weights(parts["norm_k"], k.device)[0], attn.eps), v)
    return text[index] if itself else tuple(_with_padding(x, text.repeats) for x in text[index])


def attend_to_text(attn, q, squares, k, v, repeats: int) -> torch.Tensor:
    """Cross-attention of q [B, L, C] to k and v [B, T, C], whose last row counts as `repeats`,
    before the layer `o`; in q's memory.

    q is normed already, or its projection with its rows' `squares`, see int8_product.
    """
    norm = ()
    if squares is not None:
        weight = float32_weights(attn._modules["norm_q"], q.device)[0]
        norm = weight, norms_of_squares(squares, attn.dim, attn.eps)
    q, k, v = (x.view(*x.shape[:2], -1, attn.head_dim) for x in (q, k, v))
    return text_attention(q, k, v, repeats, *norm, out=q).flatten(2)


def _with_padding(x: torch.Tensor, repeats: int) -> torch.Tensor:
    """Keys or values [B, T, C] with the last row as often as it counts."""
    return torch.cat([x, x[:, -1:].expand(-1, repeats - 1, -1)], 1) if repeats > 1 else x
