"""INT8 weights as the host's QuantizedTensor, so that ComfyUI can offload, patch and clone them.

The layout is written as comfy-kitchen has them; versions.py makes it one of ComfyUI 0.3.75.
"""

import dataclasses

import comfy.quant_ops
import torch

from ...kernels.checks import DTYPES
from ...kernels.int8_linear import int8_linear
from ...kernels.int8_quant import (
    dequantize_blocks,
    dequantize_rows,
    quantize_blocks,
    quantize_rows,
)
from .epilogue import int8_linear_with
from .versions import (
    LayoutParams,
    float_dtype_of,
    layout_of,
    quantized_tensor,
    register_layout,
    scale_of,
    unrecorded,
)

LAYOUT = "TurboInt8Layout"
HostTensor = comfy.quant_ops.QuantizedTensor


class QuantizedTensor(HostTensor):
    """The host's tensor, whose integers and scales are written in place together.

    The host takes a scheduled LoRA out with `weight.data.copy_(backup)`. `.data` of its own class
    has a copy of the scales: the weight would keep those it has with the LoRA. The name is the
    host's too, because that decides what it pins.
    """

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            # torch takes an inference tensor for an inference tensor's only. The host puts weights
            # back, when it takes a LoRA out, in whatever mode it runs then.
            with torch.inference_mode(args[0].is_inference()):
                return pack(*unpack(args[0]), float_dtype_of(args[0]))
        if func is torch.ops.aten.copy_.default and is_int8(args[0]):
            return _write(*args, **kwargs)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is args[0] and kwargs.get("copy"):  # the host makes none on the same device
            return out.clone()
        ours = isinstance(out, cls) or not is_int8(out)
        return out if ours else pack(*unpack(out), float_dtype_of(out))

    def __deepcopy__(self, memo):
        copied = pack(*(part.clone() for part in unpack(self)), float_dtype_of(self))
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, requires_grad=False)
        return memo.setdefault(id(self), copied)

    @staticmethod
    def __tensor_unflatten__(inner_tensors, ctx, outer_size, outer_stride):
        weight = HostTensor.__tensor_unflatten__(inner_tensors, ctx, outer_size, outer_stride)
        return pack(*unpack(weight), float_dtype_of(weight))


def quantize_weight(weight: torch.Tensor, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Float `weight` [out, in] to int8 and its fp32 scales, in "blocks" or "rows"."""
    return (quantize_blocks if granularity == "blocks" else quantize_rows)(weight)


def dequantize_weight(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int8 [out, in] and its scales of either granularity to floats."""
    return (dequantize_blocks if scale.ndim == 2 else dequantize_rows)(q, scale, dtype)


class TurboInt8Layout(comfy.quant_ops.QuantizedLayout):
    """int8 [out, in] with fp32 scales: one per 128x128 block, or one per output channel."""

    @dataclasses.dataclass(frozen=True)
    class Params(LayoutParams):
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
        return qtensor._qdata, scale_of(qtensor)

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata, "_scale": params.scale}

    @classmethod
    def requantize_kwargs(cls, qtensor):
        return {"granularity": granularity(qtensor)}

    @classmethod
    def linear_input_act(cls, weight, x, bias=None, *asked, **named):
        # comfy-kitchen 0.2.40; its arguments come in the order of ours.
        # Kernels have no gradients; where they are asked for, the host does it with floats.
        if x.dtype not in DTYPES or (torch.is_grad_enabled() and x.requires_grad):
            return NotImplemented
        return linear(x, weight, bias, *asked, **_our_names(named))


_REGISTERED = register_layout(LAYOUT, TurboInt8Layout)


def pack(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
    """int8 [out, in] and its scales as one tensor that dequantizes to `dtype`; no copy."""
    params = TurboInt8Layout.Params(scale, dtype, tuple(q.shape))
    return quantized_tensor(QuantizedTensor, q, LAYOUT, params)


def is_int8(weight: torch.Tensor | None) -> bool:
    """Whether `weight` is one of ours."""
    if type(weight) is QuantizedTensor:  # which is all that `pack` makes
        return True
    return isinstance(weight, HostTensor) and layout_of(weight) == LAYOUT


def unpack(weight: HostTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 [out, in] tensor and its fp32 scales; no copy."""
    return TurboInt8Layout.get_plain_tensors(weight)


def granularity(weight: HostTensor) -> str:
    """ "blocks" (128x128, the checkpoints' own) or "rows" (one scale per output channel)."""
    return "blocks" if unpack(weight)[1].ndim == 2 else "rows"


def requantize(weight: torch.Tensor, like: HostTensor, dtype: torch.dtype) -> QuantizedTensor:
    """Float `weight` [out, in] to int8 in the granularity of `like`."""
    return pack(*quantize_weight(weight, granularity(like)), dtype)


def _write(weight: HostTensor, value: torch.Tensor, non_blocking: bool = False) -> HostTensor:
    """Copy `value` [out, in], INT8 as well or float, into the memory of `weight`."""
    if not is_int8(value):
        value = requantize(value, weight, value.dtype)
    for into, new in zip(unpack(weight), unpack(value), strict=True):
        into.copy_(new, non_blocking=non_blocking)
    return weight


def linear(x: torch.Tensor, weight: HostTensor, bias=None, *asked, **named) -> torch.Tensor:
    """The INT8 linear layer of x [..., C] with a weight by itself, in the granularity it is in.

    What more may be asked of it is int8_linear_with's.
    """

    def multiply(operands, **epilogue):
        return int8_linear(*operands, *unpack(weight), bias, out_dtype=x.dtype, **epilogue)

    with unrecorded():
        return int8_linear_with(multiply, x, granularity(weight), *asked, **named)


def _our_names(named: dict) -> dict:
    """comfy-kitchen's names for what is asked of a linear layer, as int8_linear_with has them."""
    return {name.replace("input_act_", "act_"): value for name, value in named.items()}


def _host_linear(_, args: tuple, kwargs: dict) -> torch.Tensor:
    """torch.nn.functional.linear with a weight of ours: where the host multiplies it itself."""
    x, weight, *bias = args
    if is_int8(weight) and not isinstance(x, HostTensor) and x.dtype in DTYPES:
        return linear(x, weight, *bias, **kwargs)
    floats = (t.dequantize() if isinstance(t, HostTensor) else t for t in args)
    return torch.nn.functional.linear(*floats, **kwargs)


# In inference mode only, which ComfyUI runs every node in: elsewhere torch takes the operation
# apart before it gets here, and the host dequantizes the weight.
comfy.quant_ops.register_layout_op(torch.ops.aten.linear.default, _REGISTERED)(_host_linear)
