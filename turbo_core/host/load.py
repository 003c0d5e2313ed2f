"""A TurboDiffusion checkpoint as ComfyUI's own Wan model in a ModelPatcher."""

import logging
import os

import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from ..checkpoint import Checkpoint, read_checkpoint
from ..granularity import scales_of
from ..rcm import default_sigma_max
from ..sla_settings import SLASettings
from .advise import advise
from .file_slices import read_from_files
from .int8_tensor import granularity as weight_granularity
from .int8_tensor import is_int8
from .layer_settings import set_layer_settings
from .operations import Linear, TurboOperations
from .options import ADVICE, TIMESTEP
from .patch import patch_attention, wan_model
from .projections import projection
from .scheduler import carry_sigma_max
from .timesteps import round_timesteps
from .versions import has_dynamic_vram, load_diffusion_model

log = logging.getLogger(__name__)


def load_turbo_model(path: str, granularity: str = "fast", disable_dynamic: bool = False):
    """Load the checkpoint at `path` as a MODEL with SLA on, INT8 weights kept INT8.

    `granularity` is what INT8 linears multiply in, see granularity.py. The file's tensors are
    memory-mapped and become the model's weights without a copy. The model computes in bf16.
    `disable_dynamic` is for newer hosts, which load a model again without their dynamic VRAM when
    a node needs that.

    Raises:
        CheckpointError: the file is not a usable TurboDiffusion checkpoint, see read_checkpoint.
        ValueError: the granularity is unknown.
    """
    scales = scales_of(granularity)
    bar = comfy.utils.ProgressBar(1)
    checkpoint = read_checkpoint(path, progress=bar.update_absolute)
    log.info("TurboDiffusion: loading %s, %s", os.path.basename(path), _describe(checkpoint))
    model = build_turbo_model(checkpoint, scales, disable_dynamic)
    model.cached_patcher_init = (load_turbo_model, (path, granularity))
    return model


def build_turbo_model(
    checkpoint: Checkpoint, granularity: str = "rows", disable_dynamic: bool = False
):
    """A MODEL around the tensors of `checkpoint`, with SLA on where it has the projections.

    `granularity` is what INT8 linears multiply in, "rows" or "blocks"; `disable_dynamic` is for
    newer hosts, see load_turbo_model.
    """
    model = _build(checkpoint, disable_dynamic)
    _let_autograd_use(wan_model(model))
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, TIMESTEP, round_timesteps)
    carry_sigma_max(model, default_sigma_max(checkpoint.in_channels))
    set_layer_settings(wan_model(model), checkpoint.layer_settings)
    if checkpoint.has_sla:
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, ADVICE, advise)
        for block, proj_l in zip(wan_model(model).blocks, checkpoint.proj_l, strict=True):
            block.self_attn.proj_l = projection(*proj_l)
    for module in wan_model(model).modules():
        if isinstance(module, Linear):
            per_row = is_int8(module.weight) and weight_granularity(module.weight) == "rows"
            module.granularity = "rows" if per_row else granularity
    return patch_attention(model, SLASettings("sagesla" if checkpoint.has_sla else "dense"))


def _build(checkpoint: Checkpoint, disable_dynamic: bool):
    """ComfyUI's Wan model around the checkpoint's tensors."""
    state_dict = dict(checkpoint.tensors)
    for name, scale in checkpoint.scales.items():
        state_dict[f"{name}.weight_scale"] = scale
    if has_dynamic_vram() and not disable_dynamic:
        read_from_files(checkpoint.tensors.values())
    options = {"dtype": torch.bfloat16, "custom_operations": TurboOperations}
    return load_diffusion_model(state_dict, options, disable_dynamic)


def _let_autograd_use(wan: torch.nn.Module):
    """Make those parameters anew outside of inference mode, which nodes run in, that are no op's.

    The host's train node moves the model to the GPU outside of it. Autograd refuses a tensor made
    inside and moved so; what is added to an op's weight at each use makes another of it.
    """
    with torch.inference_mode(False):
        for module in wan.modules():
            if not hasattr(module, "weight_function"):
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, torch.nn.Parameter(parameter.clone()))


def _describe(checkpoint: Checkpoint) -> str:
    weights = "INT8 weights" if checkpoint.quantized else "16-bit weights"
    attention = "SLA" if checkpoint.has_sla else "no SLA projections, dense attention"
    return (
        f"Wan of {checkpoint.num_layers} blocks, dim {checkpoint.dim}, "
        f"{checkpoint.in_channels} input channels, {weights}, {attention}"
    )
