"""Which attention backend a layer asks for, as files and LoRAs set it since ComfyUI 0.40.

There every attention has a module `comfy_attention` without weights that holds the setting, and
that the host's attention function is called with. An older host has no use for the setting: then
it stays beside the attention, so that a saved file has it again.
"""

import collections
import logging
from collections.abc import Callable

import torch

from ..checkpoint.extras import LAYER_SETTING

MODULE = "comfy_attention"
KEPT = "turbodiffusion_layer_setting"  # the attribute that holds it where there is no such module

log = logging.getLogger(__name__)

Tensors = dict[str, torch.Tensor]


def set_layer_settings(wan: torch.nn.Module, settings: Tensors) -> None:
    """Give the layers of `wan` their `settings`, uint8 [n] by name, and log what becomes of them.

    The names are a file's: "blocks.0.self_attn.comfy_attention.config".
    """
    layers = dict(wan.named_modules())
    told = collections.Counter(
        _set(layers.get(name.removesuffix(LAYER_SETTING)), setting.cpu())
        for name, setting in settings.items()
    )
    for outcome, count in told.items():
        log.info("TurboDiffusion: %d layers ask for an attention backend, %s", count, outcome)


def layer_settings(wan: torch.nn.Module, module_of: Callable[[str], torch.nn.Module]) -> Tensors:
    """The settings of the layers of `wan`, by a file's names.

    `module_of` gives the module of a name inside `wan`: for a MODEL that patches it, the patch.
    """
    settings = {}
    for name, layer in wan.named_modules():
        path = f"{name}.{MODULE}"
        if isinstance(getattr(layer, MODULE, None), torch.nn.Module):
            setting = module_of(path).state_dict().get("config")
        else:
            setting = getattr(layer, KEPT, None)
        if setting is not None:
            settings[f"{path}.config"] = setting
    return settings


def preferred_attention(attn: torch.nn.Module) -> dict:
    """What the host's attention function is called with, so that it asks `attn` for its setting."""
    module = attn._modules.get(MODULE)  # an attribute that is missing takes ten times as long
    return {} if module is None else {"preferred_attention": module}


def _set(layer: torch.nn.Module | None, setting: torch.Tensor) -> str:
    """Give `layer` its setting, and tell what becomes of it."""
    if layer is None:
        return "but this model has none of their names: left out"
    module = getattr(layer, MODULE, None)
    if isinstance(module, torch.nn.Module):
        module.load_state_dict({"config": setting})
        return "which they get where SLA does not run"
    setattr(layer, KEPT, setting.clone())  # not a view of the file
    return "which this ComfyUI has no place for: kept for TurboSaveCheckpoint"
