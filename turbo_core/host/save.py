"""A Wan MODEL as a checkpoint file that TurboLoader loads again."""

import json
from pathlib import Path

import comfy.cli_args
import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from ..checkpoint import CheckpointError, check_tensors, file_tensors
from ..checkpoint.extras import LAYER_SETTING
from ..checkpoint.names import PROJ_L
from ..checkpoint.write import write_safetensors
from .int8_tensor import is_int8, pack, requantize, unpack
from .layer_settings import layer_settings
from .options import EXPERT_SWITCH, PROJECTIONS
from .patch import require_model, wan_model
from .projections import attached_projections, own_projection

PREFIX = "diffusion_model."

# A weight as the host holds it, and the patches (LoRAs) to apply to it.
Weights = dict[str, tuple[torch.Tensor, list]]


def save_turbo_model(model, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the weights of `model` to `path`, a .safetensors file in the names comfy.

    INT8 weights stay INT8 with their scales, and SLA's projections come along, attached ones too.
    What weight patches (LoRAs) change is baked in: added in float32, then back in the weight's own
    format. So is the attention backend that a layer asks ComfyUI for. Settings of SLA and other
    patches are not part of a file. `model` is untouched, wherever its weights are. Baking a LoRA
    takes about four times a weight in float32, one weight after the other.

    Raises:
        ValueError: not a Wan MODEL, or not one that TurboLoader could load again.
        FileExistsError, OSError: see write_safetensors.
    """
    require_model(model)
    _require_all_fits_a_file(model)
    weights = _weights(model)
    tensors = _loadable({n: t for name, (w, _) in weights.items() for n, t in _parts(name, w)})
    bar = comfy.utils.ProgressBar(len(tensors))

    def progress(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    baked = ((n, _baked(n, *w, model.load_device)) for n, w in weights.items())
    values = (value for name, weight in baked for value in _parts(name, weight))
    write_safetensors(path, tensors, values, metadata, progress=progress)


def workflow_metadata(prompt: dict | None, extra_pnginfo: dict | None) -> dict[str, str]:
    """The workflow as ComfyUI's own save nodes put it into a file, unless it is told not to."""
    if comfy.cli_args.args.disable_metadata:
        return {}
    parts = {"prompt": prompt, **(extra_pnginfo or {})}
    return {name: json.dumps(part) for name, part in parts.items() if part is not None}


def _require_all_fits_a_file(model) -> None:
    """Refuse what a user would miss in the file."""
    if EXPERT_SWITCH in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}):
        raise ValueError(
            "this MODEL is two experts, got one from Wan22ExpertSwitch, and a file holds one. "
            "Save each expert by itself, before Wan22ExpertSwitch"
        )
    for key in model.injections:
        if key != PROJECTIONS:
            raise ValueError(
                f"this MODEL carries modules that are not its own, got {key}, and a file would be "
                "without them. Save the MODEL from before the node that adds them (a LoRA in "
                "bypass mode, say)"
            )


def _weights(model) -> Weights:
    """The MODEL's weights, without what patches have made of them, by their names in a file."""
    has_own = own_projection(wan_model(model).blocks[0].self_attn) is not None
    weights = {}
    for key, ((weight, _), *patches) in model.get_key_patches(PREFIX).items():
        if ".self_attn.proj_l." in key and not has_own:
            continue  # attached, to another clone perhaps
        name = key.removeprefix(PREFIX).replace(".self_attn.proj_l.", f".{PROJ_L}.")
        if name.endswith(".weight_scale") and is_int8(weights[name.removesuffix("_scale")][0]):
            continue  # it is inside the weight
        if name.endswith(LAYER_SETTING):
            continue  # it is no weight, and a LoRA's would not be among these
        if not is_int8(weight) and type(weight) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(
                f"this MODEL makes no checkpoint for TurboLoader: {name} is in another quantized "
                f"format, got a {type(weight).__name__}. Load the unquantized model, or use "
                "ComfyUI's ModelSave"
            )
        weights[name] = (weight, patches)
    for index, proj_l in enumerate(attached_projections(model)):
        for part, tensor in proj_l.named_parameters():
            weights[f"blocks.{index}.{PROJ_L}.{part}"] = (tensor, [])
    settings = layer_settings(wan_model(model), lambda n: model.get_model_object(f"{PREFIX}{n}"))
    return weights | {name: (setting, []) for name, setting in settings.items()}


def _parts(name: str, weight: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """A weight's tensors as a file names them; INT8 ones have two."""
    if not is_int8(weight):
        return [(name, weight.detach())]
    q, scale = unpack(weight)
    module = name.removesuffix(".weight")
    return [(f"{module}.int8_weight", q), (f"{module}.scale", scale)]


def _loadable(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as they are, once TurboLoader would take them."""
    try:
        return file_tensors(check_tensors(tensors), "comfy")
    except CheckpointError as error:
        raise ValueError(
            f"this MODEL makes no checkpoint for TurboLoader ({error}). ComfyUI's ModelSave may "
            "save it"
        ) from error


def _baked(name: str, weight: torch.Tensor, patches: list, device: torch.device) -> torch.Tensor:
    """`weight` with its patches applied in float32, in the format it had."""
    if not patches:
        return weight
    if is_int8(weight):
        q, scale = unpack(weight)
        value = pack(q.to(device), scale.to(device), torch.float32).dequantize()
    else:
        value = weight.detach().to(device, torch.float32, copy=True)
    value = comfy.lora.calculate_weight(patches, value, f"{PREFIX}{name}")
    return requantize(value, weight, torch.float32) if is_int8(weight) else value.to(weight.dtype)
