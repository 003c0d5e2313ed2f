"""ComfyUI operations for TurboDiffusion models: a Linear that keeps INT8 weights INT8."""

import functools
import math
from collections.abc import Sequence

import comfy.float
import comfy.lora
import comfy.ops
import torch

from ...kernels.int8_linear import int8_linear, int8_linear_and_squares
from ...kernels.requantize import requantize_rows, requantize_rows_of
from .. import run_report
from ..parallel.shares import in_blocks
from .arrivals import waiting
from .epilogue import Operands, activated, added, int8_linear_with, quantize
from .gradients import records_graph
from .int8_tensor import is_int8, pack, requantize, unpack
from .merged import stand_in
from .patch_embedding import is_one_product, patches_times
from .versions import to_add_a_lora_to, unrecorded
from .weights import fetched, kept, moved, resident

# What the patch embedding makes at once, before it lies as its tokens do.
CONV_BYTES = 2**27
# Weights of so many bytes together are requantized at once: the GPU does not notice, Python does.
SMALL_BYTES = 2**24


def int8_product(
    op: "Linear",
    x: Operands,
    dtype: torch.dtype,
    channels: slice | None = None,
    squares: bool = False,
    **epilogue,
):
    """The INT8 linear layer `op` on quantized activations; `epilogue` as int8_linear takes it.

    `channels` are the output channels to compute, whole blocks of 128; None computes all. With
    `squares` as int8_linear_and_squares gives it.
    """
    comfy.ops.run_every_op()
    run_report.note_int8(op.granularity, op)
    op = _merged(op, x[0].device)
    multiply = int8_linear_and_squares if squares else int8_linear
    with fetched(op, dtype, x[0].device) as (weight, bias):
        operands = _weight_operands(weight, op.granularity, channels)
        bias = bias if channels is None or bias is None else bias[channels]
        return multiply(*x, *operands, bias, out_dtype=dtype, **epilogue)


def int8_weights(op: "Linear", dtype: torch.dtype, device: torch.device):
    """What int8_linear takes of `op`, fetched once for several products: w_q, w_scale and bias."""
    comfy.ops.run_every_op()
    run_report.note_int8(op.granularity, op)
    op = _merged(op, device)
    if (own := resident(op, dtype, device)) is not None:
        return *_weight_operands(own[0], op.granularity), own[1]
    with fetched(op, dtype, device) as (weight, bias):
        operands = _weight_operands(weight, op.granularity)
        if is_int8(weight) and operands[0] is unpack(weight)[0]:
            operands = tuple(map(kept, operands, unpack(op.weight)))
        kept_bias = None if bias is None else kept(bias, op._parameters["bias"])
    return *operands, kept_bias


def small_int8_weights(ops: Sequence["Linear"], dtype: torch.dtype, device: torch.device) -> dict:
    """What `int8_weights` gives of each of `ops`, of one shape, by the layer, all made at once.

    Empty where they are not small, or not on the GPU as they multiply: then one comes after the
    other, which takes less memory.
    """
    if len(ops) * ops[0].in_features * ops[0].out_features > SMALL_BYTES:
        return {}
    weights, biases = [], []
    for op in ops:
        own = resident(op, dtype, device)
        if own is None or not is_int8(own[0]) or op.granularity != "rows" or "merged" in vars(op):
            return {}
        q, scale = unpack(own[0])
        if scale.ndim != 2:
            return {}
        weights.append((q, scale))
        biases.append(own[1])
    comfy.ops.run_every_op()
    for op in ops:
        run_report.note_int8(op.granularity, op)
    made = requantize_rows_of(weights)
    return {op: (*w, bias) for op, w, bias in zip(ops, made, biases, strict=True)}


def of_channels(w_q, w_scale, bias, channels: slice):
    """Of what `int8_weights` gives, that of some output channels, whole blocks of 128."""
    scale = w_scale[in_blocks(channels) if w_scale.ndim == 2 else channels]
    return w_q[channels], scale, None if bias is None else bias[channels]


def _merged(op: "Linear", device: torch.device) -> "Linear":
    """`op`, or what stands in for it while it is streamed with a LoRA."""
    if not op.weight_function and "merged" not in vars(op):
        return op

    def merge():
        with waiting(device) as wait:
            weight = to_add_a_lora_to(op.weight, device)
            wait.size = op.weight.nbytes
        # As the host does it for what stays on the GPU; for what it streams it counts in 16 bits.
        weight = op.convert_weight(weight)
        for patch in op.weight_function:
            weight = comfy.lora.calculate_weight(patch.patches[patch.key], weight, patch.key)
        q, scale = _weight_operands(op.set_weight(weight, return_weight=True), op.granularity)
        merged = Linear(op.in_features, op.out_features, dtype=op.compute_dtype)
        merged.assign(q.to("cpu"), None, scale.to("cpu"))
        merged.granularity = op.granularity
        return merged

    return stand_in(op, merge)


def _weight_operands(
    weight: torch.Tensor, granularity: str, channels: slice | None = None
) -> Operands:
    """The weight in the granularity it multiplies in; it is float after a LoRA while streamed."""
    if not is_int8(weight):
        return quantize(weight if channels is None else weight[channels], granularity)
    q, scale = unpack(weight)
    if channels is not None:
        q, scale = q[channels], scale[in_blocks(channels) if scale.ndim == 2 else channels]
    if granularity == "rows" and scale.ndim == 2:
        return requantize_rows(q, scale)
    return q, scale


@torch.compiler.disable  # which would compute otherwise than the kernels do
def _quantized(op: "Linear", x: torch.Tensor, *asked) -> torch.Tensor:
    """The INT8 linear layer `op` on x [..., C], quantized first; `asked` as int8_linear_with."""
    multiply = functools.partial(int8_product, op, dtype=x.dtype)
    with unrecorded():
        return int8_linear_with(multiply, x, op.granularity, *asked)


def _recorded(op: "Linear", weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The fetched `weight` of `op` in floats that a graph for gradients can keep.

    INT8 takes no gradients itself, but passes those of its input, and a LoRA on it gets its own.

    Raises:
        ValueError: gradients are asked for of a weight that cannot get them.
    """
    if op.weight.requires_grad and is_int8(op.weight):
        raise ValueError(
            "an INT8 weight is asked for gradients, which integers do not have. Train a LoRA on "
            "it, or load a checkpoint in 16 bits"
        )
    if op.weight.requires_grad and not weight.requires_grad:
        raise ValueError(
            "a weight is asked for gradients that ComfyUI streams from RAM without them. Start "
            "ComfyUI with --disable-dynamic-vram"
        )
    return weight.dequantize().to(dtype) if is_int8(weight) else kept(weight, op.weight)


class Linear(torch.nn.Module, comfy.ops.CastWeightBiasOp):
    """Linear whose weight is whatever the checkpoint holds: float, or INT8 with its scales.

    `granularity` is what INT8 weights multiply in: "blocks", the checkpoints' own 128x128 scales,
    or "rows", one scale per token and output channel, which weights are requantized to at each use.
    Not a torch.nn.Linear, so that nothing is allocated before the tensors are assigned.
    """

    comfy_cast_weights = True

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = dtype
        self.granularity = "blocks"
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

    def forward(
        self,
        x: torch.Tensor,
        input_act: str | None = None,
        act_weight: torch.Tensor | None = None,
        act_eps: float = 0.0,
        residual: torch.Tensor | None = None,
        residual_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """residual + residual_scale * (act(x) @ weight.T + bias), x [..., C] in x's dtype.

        The signature is ComfyUI's own (0.39 and newer); for the activations see epilogue.py.
        """
        recorded = records_graph(self, x, act_weight, residual, residual_scale)
        if is_int8(self.weight) and not recorded:
            asked = input_act, act_weight, act_eps, residual, residual_scale
            return _quantized(self, x, *asked)
        x = activated(x, input_act, act_weight, act_eps)
        comfy.ops.run_every_op()
        with fetched(self, x.dtype, x.device) as (weight, bias):
            weight = _recorded(self, weight, x.dtype) if recorded else weight
            y = torch.nn.functional.linear(x, weight, bias)
        return added(y, residual, residual_scale)

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
        if inplace_update:
            self.weight.data.copy_(weight)  # keeps its memory, which the host may have pinned
            vars(self.weight).pop("in_ram", None)  # it is another now
        else:
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
        if self.weight is not None:
            self.weight = moved(self.weight, fn)
        bias = None if self.bias is None else fn(self.bias)
        if bias is not self.bias:
            self.bias = torch.nn.Parameter(bias, self.bias.requires_grad)
        return self


class _Assigned:
    """Takes the checkpoint's tensors as they are, dtype included, in place of copying them."""

    def _load_from_state_dict(self, state_dict, prefix, metadata, *args):
        metadata = {**metadata, "assign_to_params_buffers": True}
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        for name, parameter in self.named_parameters(recurse=False):
            setattr(self, f"{name}_comfy_model_dtype", parameter.dtype)  # dynamic VRAM casts to it


class TurboOperations(comfy.ops.manual_cast):
    """What ComfyUI's Wan model is built from when TurboLoader loads it."""

    Linear = Linear

    class LayerNorm(_Assigned, comfy.ops.manual_cast.LayerNorm):
        pass

    class RMSNorm(_Assigned, comfy.ops.manual_cast.RMSNorm):
        pass

    class Conv3d(_Assigned, comfy.ops.manual_cast.Conv3d):
        rounded_to = None  # the dtype of 16 bits that it may give, see patch_embedding.py

        def forward(self, x, *args, **kwargs):
            if is_one_product(self, x):
                comfy.ops.run_every_op()
                with fetched(self, x.dtype, x.device) as (weight, bias):
                    return patches_times(x, weight, bias, self.rounded_to)
            # Then the channels of a token lie side by side, and the first block need not copy them.
            # What goes in so comes out so, but not everywhere: some frames after the others, as
            # both at once are more than anything else takes.
            parts, out, first = x.split(self._frames_at_once(x), dim=2), None, 0
            for part in parts:
                part = part.contiguous(memory_format=torch.channels_last_3d)
                y = super().forward(part, *args, **kwargs)
                if len(parts) == 1:
                    return y.contiguous(memory_format=torch.channels_last_3d)
                if out is None:
                    shape = *y.shape[:2], x.shape[2], *y.shape[3:]
                    layout = {"memory_format": torch.channels_last_3d}
                    out = torch.empty(shape, dtype=y.dtype, device=y.device, **layout)
                out[:, :, first : first + y.shape[2]] = y
                first += y.shape[2]
            return out

        def _frames_at_once(self, x):
            frame = x.shape[-2] * x.shape[-1] // math.prod(self.stride[1:]) * x.element_size()
            frames = CONV_BYTES // (len(x) * self.out_channels * frame + 1)
            alone = self.kernel_size[0] == self.stride[0] == 1 and not any(self.padding)
            return max(frames, 1) if alone else x.shape[2]
