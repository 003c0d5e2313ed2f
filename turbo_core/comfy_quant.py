"""INT8 weights as the host's QuantizedTensor, so that ComfyUI can offload, patch and clone them.

Two generations of the host's interface exist: plain dicts of layout parameters (ComfyUI 0.3.75),
and comfy-kitchen's typed parameters (0.4 and newer).
"""

import dataclasses

import comfy.quant_ops
import torch

from ..kernels.int8_quant import (
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
    quantize_rows,
)

LAYOUT = "TurboInt8Layout"
QuantizedTensor = comfy.quant_ops.QuantizedTensor


def quantize_weight(weight: torch.Tensor, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Float `weight` [out, in] to int8 and its fp32 scales, in "blocks" or "rows"."""
    return (quantize_blocks if granularity == "blocks" else quantize_rows)(weight)


def dequantize_weight(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [out, in] and its scales of either granularity to floats."""
    return (dequantize_blocks if scale.ndim == 2 else dequantize_rows)(q, scale, dtype)


if hasattr(comfy.quant_ops, "LAYOUTS"):

    class TurboInt8Layout(comfy.quant_ops.QuantizedLayout):
        """int8 [out, in] with fp32 scales: one per 128x128 block, or one per output channel."""

        @classmethod
        def quantize(cls, tensor, granularity="blocks", **_):
            q, scale = quantize_weight(tensor, granularity)
            return q, {"scale": scale, "orig_dtype": tensor.dtype}

        @staticmethod
        def dequantize(qdata, scale, orig_dtype, **_):
            return dequantize_weight(qdata, scale, orig_dtype)

        @classmethod
        def get_plain_tensors(cls, qtensor):
            return qtensor._qdata, qtensor._layout_params["scale"]

    comfy.quant_ops.LAYOUTS[LAYOUT] = TurboInt8Layout

    def pack(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
        """int8 [out, in] and its scales as one tensor that dequantizes to `dtype`; no copy."""
        return QuantizedTensor(q, LAYOUT, {"scale": scale, "orig_dtype": dtype})

    def _layout_name(weight: QuantizedTensor) -> str:
        return weight._layout_type

else:
    from comfy_kitchen.tensor.base import BaseLayoutParams

    class TurboInt8Layout(comfy.quant_ops.QuantizedLayout):
        """int8 [out, in] with fp32 scales: one per 128x128 block, or one per output channel."""

        @dataclasses.dataclass(frozen=True)
        class Params(BaseLayoutParams):
            """Scales, and the dtype and shape the weight dequantizes to."""

        @classmethod
        def quantize(cls, tensor, granularity="blocks", **_):
            q, scale = quantize_weight(tensor, granularity)
            return q, cls.Params(scale, tensor.dtype, tuple(tensor.shape))

        @classmethod
        def dequantize(cls, qdata, params):
            return dequantize_weight(qdata, params.scale, params.orig_dtype)

        @classmethod
        def get_plain_tensors(cls, qtensor):
            return qtensor._qdata, qtensor._params.scale

        @classmethod
        def state_dict_tensors(cls, qdata, params):
            return {"": qdata, "_scale": params.scale}

        @classmethod
        def requantize_kwargs(cls, qtensor):
            return {"granularity": granularity(qtensor)}

    comfy.quant_ops.register_layout_class(LAYOUT, TurboInt8Layout)

    def pack(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
        """int8 [out, in] and its scales as one tensor that dequantizes to `dtype`; no copy."""
        params = TurboInt8Layout.Params(scale, dtype, tuple(q.shape))
        return QuantizedTensor(q, LAYOUT, params)

    def _layout_name(weight: QuantizedTensor) -> str:
        return weight._layout_cls


def is_int8(weight: torch.Tensor | None) -> bool:
    """Whether `weight` is one of ours."""
    return isinstance(weight, QuantizedTensor) and _layout_name(weight) == LAYOUT


def unpack(weight: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 [out, in] tensor and its fp32 scales; no copy."""
    return TurboInt8Layout.get_plain_tensors(weight)


def granularity(weight: QuantizedTensor) -> str:
    """ "blocks" (128x128, the checkpoints' own) or "rows" (one scale per output channel)."""
    return "blocks" if unpack(weight)[1].ndim == 2 else "rows"


def requantize(weight: torch.Tensor, like: QuantizedTensor, dtype: torch.dtype) -> QuantizedTensor:
    """Float `weight` [out, in] to int8 in the granularity of `like`."""
    return pack(*quantize_weight(weight, granularity(like)), dtype)
