"""What a worker does for a run that several GPUs share: it has the models, and does its part of
each forward pass. Each function is a job, see parallel/workers.py."""

import contextlib

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from ..parallel.exchange import Ranks
from ..sla_settings import SLASettings
from . import per_run
from .attention_order import settle
from .memory import told_to_the_host
from .options import ATTENTION
from .patch import patch_attention, wan_model
from .split_pass import split_over, why_not_split

_loaded = {}  # key -> the MODEL as its file has it
_models = {}  # key -> the same with its patches, ready to share passes
_run = contextlib.ExitStack()  # ends with the run


@torch.inference_mode()
def prepare(ranks: Ranks, key: int, alive: set[int], loader, patches, options, shape) -> None:
    """Have the model `key` on the GPU for passes of x `shape`; forget all that are not `alive`.

    Args:
        loader: how to load the model, see loader_of; None where it is there.
        patches: its ModelPatcher.patches; None where it has had the same before.
        options: of its passes; the attention's settings are in there.
    """
    for kept in (_loaded, _models):
        for gone in kept.keys() - alive:
            del kept[gone]
    if loader is not None:
        load, arguments, *output = loader
        model = load(*arguments)
        _loaded[key] = model[output[0]] if output else model
    if patches is not None:
        model = patch_attention(_loaded[key], SLASettings(**options[ATTENTION]))
        if patches:
            model.add_patches({})  # whose patches are others than before
            model.patches = patches
        _models[key] = split_over(model, ranks)
    _models[key].model_options["transformer_options"][ATTENTION] = options[ATTENTION]
    if per_run.current() is None:
        _run.enter_context(per_run.keep())
    _load(_models[key], shape)


def _load(model, shape: tuple[int, ...]) -> None:
    settle(model.load_device)
    with told_to_the_host(model, {"positive": [{}]}, model.model_options):
        need = model.memory_required(shape)
    comfy.model_management.load_models_gpu([model], memory_required=need)


@torch.inference_mode()
def forward(ranks: Ranks, key: int, x, timestep, context, clip_fea, options: dict) -> None:
    """This rank's part of a forward pass of the model `key`.

    Raises:
        RuntimeError: it cannot share what rank 0 does.
    """
    model = _models[key]
    wan = wan_model(model)
    if reason := why_not_split(wan, x, timestep, context, options, ranks.count):
        raise RuntimeError(f"a worker cannot share this pass, as {reason}")
    wrappers = {WrappersMP.DIFFUSION_MODEL: model.wrappers[WrappersMP.DIFFUSION_MODEL]}
    wan(x, timestep, context, clip_fea, None, {**options, "wrappers": wrappers})


def end_run(ranks: Ranks) -> None:
    """Forget what was kept for the run."""
    _run.close()
