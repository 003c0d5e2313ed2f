"""SLA's projections for a MODEL that another loader has loaded.

They come from a TurboDiffusion checkpoint, one for each block, or from SimpleTuner's
sla_attention.pt, one for all of them.

They are attached while the host has the patched clone loaded and taken off with it, so that the
model that all clones share stays as it was.
"""

import logging
from os import PathLike
from pathlib import Path

import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection

from ..checkpoint import Checkpoint, read_checkpoint
from ..checkpoint.simpletuner import read_shared_projection
from .operations import Linear
from .options import PROJECTIONS
from .patch import wan_model

log = logging.getLogger(__name__)

Pair = tuple[torch.Tensor, torch.Tensor]  # weight [128, 128] and bias [128]


def attach_projections(model, path: str | PathLike):
    """A clone of `model` that has the SLA projections of the file at `path`.

    Nothing else of the file is used. A second file takes the place of the first.

    Raises:
        CheckpointError: the file is not a usable checkpoint, see read_checkpoint.
        ValueError: the MODEL is not Wan or has projections from its own file, or the file has none
            or is of a model of another size.
    """
    wan = wan_model(model)
    if any(own_projection(block.self_attn) is not None for block in wan.blocks):
        raise ValueError(
            "this MODEL has SLA projections from its own file already, got another file for them. "
            "Set projections to none"
        )
    # Copies, as the tensors are views of the whole file.
    pairs = _shared_pairs(path, wan) or _pairs(path, wan)
    projections = [projection(weight.clone(), bias.clone()) for weight, bias in pairs]
    patched = model.clone()
    patched.set_injections(PROJECTIONS, [_injection(projections)])
    if not patched.callbacks.get(CallbacksMP.ON_CLONE, {}).get(PROJECTIONS):
        patched.add_callback_with_key(CallbacksMP.ON_CLONE, PROJECTIONS, _nothing_injected)
    patched.is_injected = False
    return patched


def attached_projections(model) -> list[Linear]:
    """The proj_l that `attach_projections` gave each block of `model`; empty where it did not."""
    return [proj_l for part in model.injections.get(PROJECTIONS, ()) for proj_l in part.projections]


def projection(weight: torch.Tensor, bias: torch.Tensor) -> Linear:
    """One head's proj_l, weight [128, 128] and bias [128], as an op that the host can move."""
    linear = Linear(*weight.shape, dtype=torch.float32)
    linear.assign(weight, bias)
    return linear


def own_projection(attn: torch.nn.Module) -> Linear | None:
    """The proj_l that this self-attention was loaded with, if any: none that was attached."""
    proj_l = getattr(attn, "proj_l", None)
    return None if getattr(proj_l, "attached", False) else proj_l


def _shared_pairs(path: str | PathLike, wan: torch.nn.Module) -> list[Pair]:
    """SimpleTuner's one projection for each block; empty for a file of another kind."""
    shared = read_shared_projection(path)
    if shared is None:
        return []
    log.info("TurboDiffusion: one projection for all blocks, trained at top-k %g", shared.topk)
    return [(shared.weight.float(), shared.bias.float())] * len(wan.blocks)


def _pairs(path: str | PathLike, wan: torch.nn.Module) -> tuple[Pair, ...]:
    """Weight and bias of each block out of a checkpoint that fits."""
    checkpoint = read_checkpoint(path)
    _require_projections_of(path, checkpoint, wan)
    return checkpoint.proj_l


def _require_projections_of(
    path: str | PathLike, checkpoint: Checkpoint, wan: torch.nn.Module
) -> None:
    file = Path(path).name  # not where it is: the message may reach a client of the server
    if not checkpoint.has_sla:
        raise ValueError(
            f"{file} has no SLA projections (proj_l), so there is nothing to attach. Choose a "
            "TurboDiffusion checkpoint, or none"
        )
    sizes = {
        "blocks": (checkpoint.num_layers, len(wan.blocks)),
        "channels": (checkpoint.dim, wan.dim),
        "channels per head": (checkpoint.head_dim, wan.dim // wan.num_heads),
    }
    for name, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise ValueError(
                f"{file} has the SLA projections of a model of {theirs} {name}, this MODEL has "
                f"{ours}. Choose the TurboDiffusion checkpoint of the same model size"
            )


def _injection(projections: list[Linear]) -> PatcherInjection:
    """What puts one of `projections` into each block's self-attention, and takes it out again."""

    def inject(patcher):
        for block, proj_l in zip(_blocks(patcher), projections, strict=True):
            proj_l.attached = True
            block.self_attn.proj_l = proj_l.to(patcher.load_device)

    def eject(patcher):
        for block, proj_l in zip(_blocks(patcher), projections, strict=True):
            if getattr(block.self_attn, "proj_l", None) is proj_l:
                del block.self_attn.proj_l
            proj_l.to(patcher.offload_device)

    injection = PatcherInjection(inject, eject)
    injection.projections = projections
    return injection


def _blocks(patcher) -> torch.nn.ModuleList:
    return patcher.model.diffusion_model.blocks


def _nothing_injected(_, clone) -> None:
    # The host copies the mark that says a model is injected, which is true of the original only:
    # a clone that goes would take the original's projections with it.
    clone.is_injected = False
