"""What ComfyUI asks of a Linear beside the product: an activation before it, a residual behind it.

Newer hosts (0.39) hand these to every Linear's forward as `input_act, act_weight, act_eps,
residual, residual_scale`. INT8 layers do what their kernels can in the quantizer and in the
product, and the rest as ComfyUI does for float ones.
"""

from collections.abc import Callable

import comfy.rmsnorm
import torch

from ...kernels.int8_quant import ACTIVATIONS as QUANTIZER_ACTIVATIONS
from ...kernels.int8_quant import quantize_blocks, quantize_rows
from .versions import INPUT_ACTIVATIONS

Operands = tuple[torch.Tensor, torch.Tensor]  # int8 and its float32 scales


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


# By the names that ComfyUI gives them: the host's own, and those that this pack knows besides.
ACTIVATIONS = {
    **INPUT_ACTIVATIONS,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "swiglu": _swiglu,
}


def activated(
    x: torch.Tensor, name: str | None, weight: torch.Tensor | None = None, eps: float = 0.0
) -> torch.Tensor:
    """The activation `name` of x [..., C], in its dtype; `weight` and `eps` are for "rms_norm".

    Raises:
        ValueError: an activation that neither the host nor this pack knows.
    """
    if name is None:
        return x
    if name == "rms_norm":
        return comfy.rmsnorm.rms_norm(x, weight, eps)
    if name not in ACTIVATIONS:
        raise ValueError(
            f"this ComfyUI asks a Linear for an activation unknown here, got {name!r}: update "
            "TurboDiffusion for Wan"
        )
    return ACTIVATIONS[name](x)


def added(
    y: torch.Tensor, residual: torch.Tensor | None, scale: torch.Tensor | None
) -> torch.Tensor:
    """residual + y * scale, where there is a residual; without a scale their sum."""
    if residual is None:
        return y
    return residual + y if scale is None else torch.addcmul(residual, y, scale)


def quantize(x: torch.Tensor, granularity: str, activation: str | None = None) -> Operands:
    """Activations [B, L, C] to INT8 in "blocks" or "rows", after `activation` if there is one."""
    quantizer = {"blocks": quantize_blocks, "rows": quantize_rows}[granularity]
    return quantizer(x, activation=activation)


def int8_linear_with(
    multiply: Callable[..., torch.Tensor],
    x: torch.Tensor,
    granularity: str,
    input_act: str | None = None,
    act_weight: torch.Tensor | None = None,
    act_eps: float = 0.0,
    residual: torch.Tensor | None = None,
    residual_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """An INT8 linear layer on x [..., C] with all that ComfyUI may ask of it, in x's dtype.

    `multiply` is its product, called with quantized activations [B, L, C] and int8_linear's `gate`
    and `residual`.
    """
    activation = input_act if input_act in QUANTIZER_ACTIVATIONS else None
    if activation is None:
        x = activated(x, input_act, act_weight, act_eps)
    shape = x.shape[:-1]
    operands = quantize(_as_batch(x), granularity, activation=activation)
    if residual is None:
        return multiply(operands).reshape(*shape, -1)
    if residual.dtype == x.dtype and residual.shape[:-1] == shape and residual.stride(-1) == 1:
        residual = _as_batch(residual)
        gate = _gate(residual_scale, residual.shape, shape)
        return multiply(operands, gate=gate, residual=residual).reshape(*shape, -1)
    return added(multiply(operands).reshape(*shape, -1), residual, residual_scale)


def _as_batch(x: torch.Tensor) -> torch.Tensor:
    """x [..., C] as [B, L, C], the shape that the kernels take."""
    return x if x.ndim == 3 else x.reshape(-1, x.shape[-2] if x.ndim > 1 else 1, x.shape[-1])


def _gate(scale: torch.Tensor | None, batch: torch.Size, shape: torch.Size) -> torch.Tensor | None:
    """`scale`, which broadcasts to [*shape, N], as int8_linear takes a gate: [B, 1 or L, N]."""
    if scale is None:
        return None
    same_for_all_tokens = len(shape) == 2 and (scale.ndim < 2 or scale.shape[-2] == 1)
    if same_for_all_tokens:
        return scale.expand(batch[0], 1, batch[2])
    return _as_batch(scale.expand(*shape, batch[2]))
