"""ComfyUI operations for TurboDiffusion models: a Linear that keeps INT8 weights INT8."""

import inspect

import comfy.float
import comfy.ops
import torch

from ..kernels.int8_linear import int8_linear
from ..kernels.int8_quant import quantize_blocks, quantize_rows
from . import run_report
from .comfy_quant import granularity, is_int8, pack, requantize, unpack

# Newer hosts requantize a weight after patching it, if asked to.
_parameters = inspect.signature(comfy.ops.cast_bias_weight).parameters
_REQUANTIZE = {"want_requant": True} if "want_requant" in _parameters else {}


def fetch(op: torch.nn.Module, x: torch.Tensor):
    """Weight, bias and offload stream of a comfy op, on x's device; INT8 weights stay INT8.

    The caller hands all three to comfy.ops.uncast_bias_weight after their last use.
    """
    patched = len(op.weight_function) > 0
    dtype = op.weight.dtype if is_int8(op.weight) and not patched else x.dtype
    return comfy.ops.cast_bias_weight(
        op, dtype=dtype, device=x.device, bias_dtype=x.dtype, offloadable=True, **_REQUANTIZE
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [B, L, in] times an INT8 or float weight [out, in], plus bias, in x's dtype."""
    if not is_int8(weight):
        return torch.nn.functional.linear(x, weight, bias)
    w_q, w_scale = unpack(weight)
    x_q, x_scale = (quantize_blocks if w_scale.ndim == 2 else quantize_rows)(x)
    run_report.note_int8(granularity(weight), run_report.kernel_name(x.device))
    return int8_linear(x_q, x_scale, w_q, w_scale, bias, out_dtype=x.dtype)


class Linear(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """Linear whose weight is whatever the checkpoint holds: float, or INT8 with its scales.

    Not a torch.nn.Linear, so that nothing is allocated before the checkpoint's tensors are assigned.
    """

    comfy_cast_weights = True

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = dtype
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        # Where the host streams weights, it casts float ones to these.
        self.weight_comfy_model_dtype = dtype
        self.bias_comfy_model_dtype = dtype

    @property
    def weight_scale(self):
        return unpack(self.weight)[1]

    def assign(self, weight, bias=None, scale=None):
        """Take tensors as they are; `scale` makes an int8 `weight` a quantized one."""
        if scale is not None:
            weight = pack(weight, scale, self.compute_dtype)
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = torch.nn.Parameter(bias, requires_grad=False)

    def forward(self, x):
        comfy.ops.run_every_op()
        weight, bias, stream = fetch(self, x)
        if is_int8(self.weight) and not is_int8(weight):
            weight = requantize(weight, self.weight, self.compute_dtype)
        y = linear(x, weight, bias)
        comfy.ops.uncast_bias_weight(self, weight, bias, stream)
        return y

    def convert_weight(self, weight, inplace=False, **_):
        """Host hook: the float weight that a LoRA is added to."""
        return weight.dequantize() if is_int8(weight) else weight

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **_):
        """Host hook: take back a weight that a LoRA was added to."""
        if is_int8(self.weight):
            weight = requantize(weight, self.weight, self.compute_dtype)
        else:
            weight = comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed)
        if return_weight:
            return weight
        self.weight = torch.nn.Parameter(weight, requires_grad=False)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing.append(prefix + "weight")
            return
        scale = state_dict.get(prefix + "weight_scale")
        self.assign(weight, state_dict.get(prefix + "bias"), scale)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if is_int8(self.weight):
            destination[prefix + "weight"], destination[prefix + "weight_scale"] = unpack(
                self.weight
            )
        elif self.weight is not None:
            destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _apply(self, fn, recurse=True):
        # torch's own version writes through `.data`, which a wrapper tensor does not have.
        for name, parameter in self._parameters.items():
            moved = None if parameter is None else fn(parameter)
            if moved is not parameter:
                self._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
        return self


class _Assigned:
    """Takes the checkpoint's tensors as they are, dtype included, in place of copying them."""

    def _load_from_state_dict(self, state_dict, prefix, metadata, *args):
        metadata = {**metadata, "assign_to_params_buffers": True}
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


class TurboOperations(comfy.ops.manual_cast):
    """What ComfyUI's Wan model is built from when TurboLoader loads it."""

    Linear = Linear

    class LayerNorm(_Assigned, comfy.ops.manual_cast.LayerNorm):
        pass

    class RMSNorm(_Assigned, comfy.ops.manual_cast.RMSNorm):
        pass

    class Conv3d(_Assigned, comfy.ops.manual_cast.Conv3d):
        pass
