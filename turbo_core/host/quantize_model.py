"""Any Wan MODEL as a new one with INT8 weights."""

import logging
from collections.abc import Iterator

import comfy.model_management
import comfy.ops
import comfy.utils
import torch

from ..checkpoint.sizes import BLOCK_LINEARS, IMAGE_LINEARS
from ..granularity import scales_of
from .int8_tensor import HostTensor, dequantize_weight, is_int8, quantize_weight, unpack
from .patch import wan_model
from .rebuild import FLOATS, float_dtype, rebuilt, require_nothing_tied
from .versions import has_scaled_weight, loader_of
from .weights import room_for, to_keep

QUANTIZED = (*BLOCK_LINEARS, *IMAGE_LINEARS)
# Rows of a weight that are quantized at once, in whole blocks of scales: bounds the memory.
ROWS = 256
# GPU memory for one weight, in bytes a value: itself, int8, and for the report thrice float32.
WORKSPACE = 16

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


def quantize_model(model, granularity: str = "fast", report: bool = False):
    """A new MODEL like `model` with the Linears of its blocks in INT8, and a table of errors.

    Patches (LoRA too: the host adds it to the INT8 weights), options, wrappers and callbacks are
    carried over. Of `model` nothing changes but that it leaves the GPU; the two share no weight.
    The work goes layer by layer: at its peak it takes the new model and one float32 weight, with
    `report` four.

    Args:
        granularity: "fast", a scale per output channel, or "exact", one per 128x128 block.
        report: measure |dequantized - weight| / |weight| of every layer.

    Returns:
        The MODEL, and the table as text, empty without `report`.

    Raises:
        ValueError: the granularity is unknown, or the MODEL is not Wan, is INT8 already, has
            weights in a format unknown here or values that are not finite, or carries a patch that
            is tied to its float weights.
    """
    scales = scales_of(granularity)
    wan_model(model)
    _unload(model)
    require_nothing_tied(model)
    linears = _block_linears(model.model.diffusion_model)
    _require_readable_weights(linears)
    errors = {} if report else None
    tensors = _quantized_tensors(model, linears, scales, errors)
    quantized = rebuilt(model, tensors, scales)
    if (loader := loader_of(model)) is not None:
        quantized.cached_patcher_init = (_again, (loader, granularity))
    log.info(
        "TurboDiffusion: quantized %d linears to INT8, %s; the model had %.2f GB, it has %.2f GB",
        *(len(linears), granularity, model.model_size() / 1e9, quantized.model_size() / 1e9),
    )
    return quantized, _table(errors) if report else ""


def _again(loader: tuple, granularity: str, disable_dynamic: bool = False):
    """Load and quantize again, for hosts that need a model a second time."""
    load, arguments, *output = loader
    model = load(*arguments, disable_dynamic=disable_dynamic)
    return quantize_model(model[output[0]] if output else model, granularity)[0]


def _block_linears(wan: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The Linears to quantize, by name."""
    modules = dict(wan.named_modules())
    names = (f"blocks.{index}.{name}" for index in range(len(wan.blocks)) for name in QUANTIZED)
    return {name: modules[name] for name in names if name in modules}


def _require_readable_weights(linears: dict[str, torch.nn.Module]) -> None:
    if all(is_int8(linear.weight) for linear in linears.values()):
        raise ValueError(
            f"all {len(linears)} linears of this MODEL are INT8 already, there is nothing left to "
            "quantize. Leave W8A8Quantize out"
        )
    for name, linear in linears.items():
        if not _is_readable(linear):
            weight = linear.weight
            raise ValueError(
                f"{name} holds its weight in a format unknown here, got {type(weight).__name__} "
                f"{weight.dtype} in a {type(linear).__module__}.{type(linear).__name__}. Load the "
                "model with ComfyUI's own loader, from a file in bf16, fp16 or fp8"
            )


def _is_readable(linear: torch.nn.Module) -> bool:
    if not isinstance(linear, comfy.ops.CastWeightBiasOp):
        return False
    if getattr(linear, "pre_quant_scale", None) is not None:  # scales the input, not the weight
        return False
    weight = linear.weight
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.is_floating_point()
    return plain or isinstance(weight, HostTensor)


def _unload(model) -> None:
    """Take `model` and its clones off the GPU, and every patch out of the model they share."""
    others = [
        loaded
        for loaded in comfy.model_management.current_loaded_models
        if loaded.model is None or not loaded.model.is_clone(model)
    ]
    comfy.model_management.free_memory(1e30, model.load_device, others)


def _quantized_tensors(model, linears: dict, granularity: str, errors: dict | None) -> Tensors:
    """Everything in the diffusion model of `model` as new tensors, its `linears` in INT8."""
    device, offload_device = model.load_device, model.offload_device
    if not comfy.model_management.is_device_cpu(device):
        largest = max(linear.weight.numel() for linear in linears.values())
        comfy.model_management.free_memory(WORKSPACE * largest, device)
    bar = comfy.utils.ProgressBar(len(linears))
    dtype, tensors = float_dtype(model.model), {}
    for name, module, parameter, tensor in _own_tensors(model.model.diffusion_model):
        key = f"{name}.{parameter}" if name else parameter
        if name in linears and parameter == "weight":
            comfy.model_management.throw_exception_if_processing_interrupted()
            q, scale = _int8(module, granularity, device, name, errors)
            tensors[key] = to_keep(q, offload_device)
            tensors[f"{key}_scale"] = scale.to(offload_device)
            bar.update(1)
        elif isinstance(tensor, HostTensor) or (
            parameter == "weight" and has_scaled_weight(module)
        ):
            tensors[key] = _float_weight(module, offload_device).to(dtype)
        else:
            tensors[key] = tensor.detach().to(offload_device, copy=True)
    return tensors


def _own_tensors(wan: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str, torch.Tensor]]:
    """(module name, module, parameter or buffer, tensor) of all that makes up the model itself.

    Left out are the scales that a Linear keeps of its weight, and SLA's projections.
    """
    for name, module in wan.named_modules():
        if name.endswith(".proj_l"):
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for parameter, tensor in own:
            is_op = isinstance(module, comfy.ops.CastWeightBiasOp)
            if not is_op or parameter in ("weight", "bias"):
                yield name, module, parameter, tensor


def _float_weight(module: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """The weight as it multiplies, in float32, fp16 or bf16."""
    weight = module.weight.detach().to(device)
    if hasattr(module, "convert_weight"):
        weight = module.convert_weight(weight)
    return weight if weight.dtype in FLOATS else weight.to(torch.bfloat16)  # exact for fp8


def _int8(module, granularity: str, device, name: str, errors: dict | None):
    """int8 and scales of one weight; INT8 weights stay as they are."""
    if is_int8(module.weight):
        q, scale = unpack(module.weight)
        return q.clone(), scale.clone()
    weight = _float_weight(module, device)
    finite = weight.isfinite()  # not left to the scales: a GPU's maximum passes over NaN
    if not finite.all():
        raise ValueError(
            f"{name} has values that are not finite, got {int((~finite).sum())} of "
            f"{weight.numel()}: the file is damaged, download it again"
        )
    q, scales = room_for(weight.shape, weight.device), []
    for part, rows in zip(q.split(ROWS), weight.split(ROWS), strict=True):
        integers, scale = quantize_weight(rows, granularity)
        part.copy_(integers)
        scales.append(scale)
    scale = torch.cat(scales)
    if errors is not None:
        errors[name] = _relative_error(dequantize_weight(q, scale, torch.float32), weight.float())
    return q, scale


def _relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _table(errors: dict[str, float]) -> str:
    """One line a layer, and the mean and the worst below."""
    width = max(map(len, errors))
    lines = [f"{name:<{width}}  {error:.5f}" for name, error in errors.items()]
    worst = max(errors, key=errors.get)
    mean = sum(errors.values()) / len(errors)
    lines.append(f"mean {mean:.5f}, worst {errors[worst]:.5f} ({worst})")
    text = "\n".join(["Relative L2 error of the INT8 weights", *lines])
    log.info("TurboDiffusion: %s", text)
    return text
