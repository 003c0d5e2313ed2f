"""A MODEL whose forward passes several GPUs share, each with the same weights.

The sampler runs in ComfyUI's process, which is rank 0 and has one GPU. Each further GPU has a
worker process that loads the same file and takes part in each forward pass, see split_worker.py.
"""

from collections.abc import Callable

import comfy.model_management
import torch
from comfy.patcher_extension import WrappersMP

from .. import run_report
from ..parallel.parcels import UnsendableError, wrap
from ..parallel.workers import nothing
from . import per_run, split_worker
from .gpu_workers import key_of, keys_alive, uninterrupted, why_no_workers, workers_for
from .options import ATTENTION, EXPERT_BOUNDARY, SPLIT
from .patch import wan_model
from .patch_owner import is_ours
from .split_pass import split_pass, why_not_split
from .versions import COMPILED, loader_of

# Of the options of a forward pass, those that reach what workers run.
TOLD = (ATTENTION, EXPERT_BOUNDARY, "sample_sigmas", "sigmas", "rope_options")
OUTSIDE = "it is outside of a sampler run, or a LoRA is scheduled"
BY_COMPILER = "torch.compile has the model, whose layers one GPU runs: leave it out"


def share_among(model, gpus: int):
    """A clone of `model` whose forward passes `gpus` GPUs share, this process's one among them.

    A pass that cannot be shared runs on one GPU, and the run's line in the log says why.

    Raises:
        ValueError: not a Wan MODEL.
    """
    wan_model(model)

    @torch.compiler.disable(recursive=False)
    def around_forward(
        executor, x, timestep, context, clip_fea=None, concat=None, transformer_options=None, **more
    ):
        options = transformer_options or {}
        inputs = x, timestep, context, clip_fea
        patcher = _loaded_patcher(executor.class_obj)
        reason = (
            why_no_workers(gpus, x.device)
            or _why_not_alike(executor, concat, options, more)
            or why_not_split(executor.class_obj, x, timestep, context, options, gpus)
            or per_run.made((SPLIT, patcher), lambda: _why_not_loaded_alike(patcher, gpus))
        )
        if reason is not None:
            run_report.note_gpus(f"on one GPU, as {reason}")
            return executor(*inputs, concat, options, **more)
        run_report.note_gpus(f"on {gpus} GPUs")
        run = per_run.made(SPLIT, lambda: SharedRun(gpus, x.device))
        return run.forward(executor, patcher, inputs, options)

    def around_load(executor, patcher, shape, conds, model_options=None, *others, **more):
        def load(*_):
            return executor(patcher, shape, conds, model_options, *others, **more)

        if why_no_workers(gpus, patcher.load_device) or _why_not_loaded_alike(patcher, gpus):
            return load()
        run = per_run.made(SPLIT, lambda: SharedRun(gpus, patcher.load_device))
        options = (model_options or patcher.model_options)["transformer_options"]
        return run.prepare(patcher, options, tuple(shape), load)

    patched = model.clone()
    for kind, wrapper in (
        (WrappersMP.PREPARE_SAMPLING, around_load),
        (WrappersMP.DIFFUSION_MODEL, around_forward),
    ):
        patched.remove_wrappers_with_key(kind, SPLIT)
        if gpus > 1:
            patched.add_wrapper_with_key(kind, SPLIT, wrapper)
    return patched


class SharedRun:
    """A sampler run that is shared with workers."""

    def __init__(self, gpus: int, device: torch.device):
        self.workers = workers_for(gpus, device)
        self.workers.check()  # one may have ended since the last run
        self.ready = None  # the model that workers have on their GPUs
        per_run.current().ends.callback(self._end)

    def prepare(self, patcher, options: dict, shape: tuple[int, ...], load: Callable):
        """load(), by which ComfyUI loads `patcher` for passes of x `shape`, while workers do."""
        key = key_of(patcher.model)
        known = self.workers.known
        loader = None if key in known else loader_of(patcher)
        patches = None if known.get(key) == patcher.patches_uuid else dict(patcher.patches)
        arguments = key, keys_alive(), loader, patches, _told(options), shape
        with uninterrupted():
            found = self.workers.together(split_worker.prepare, arguments, load)
        self.workers.notes[key] = patcher.patches_uuid
        self.ready = key
        return found

    def forward(self, executor, patcher, inputs: tuple, options: dict) -> torch.Tensor:
        """A forward pass of the model that `patcher` has loaded, shared."""
        key = key_of(patcher.model)
        if self.ready != key or not self.workers.running:  # new ones know no model
            self.prepare(patcher, options, tuple(inputs[0].shape), nothing)

        def own(ranks):
            with uninterrupted():
                return split_pass(executor, ranks, inputs, options)

        # Before and after, no rank waits for another: here a run can be cancelled.
        comfy.model_management.throw_exception_if_processing_interrupted()
        out = self.workers.together(split_worker.forward, (key, *inputs, _told(options)), own)
        comfy.model_management.throw_exception_if_processing_interrupted()
        return out

    def _end(self) -> None:
        self.workers.check(split_worker.end_run)  # what was computed stays so, whatever ends now


def _told(options: dict) -> dict:
    return {name: options[name] for name in TOLD if name in options}


def _loaded_patcher(wan: torch.nn.Module):
    """The MODEL through which ComfyUI has loaded `wan`; None where it has not."""
    for loaded in comfy.model_management.current_loaded_models:
        patcher = loaded.model
        if patcher is not None and getattr(patcher.model, "diffusion_model", None) is wan:
            return patcher
    return None


def _why_not_alike(executor, concat, options: dict, more: dict) -> str | None:
    """Why workers would not compute the same as this process in this pass; None if they would."""
    if _is_compiled(options.get("wrappers", {})):
        return BY_COMPILER
    if executor.idx + 1 < len(executor.wrappers):
        return "a node behind Turbo Sequence Parallel wraps the model: put that one before"
    given = [name for name, value in more.items() if value is not None]
    if concat is not None or given:
        return f"it has conditions of another kind: {', '.join(given) or 'time_dim_concat'}"
    if any(options.get("patches", {}).values()):
        return "a node patches its blocks"
    if "optimized_attention_override" in options:
        return "a node puts another attention in"
    return None if per_run.current() else OUTSIDE


def _is_compiled(wrappers: dict) -> bool:
    return COMPILED in wrappers.get(WrappersMP.APPLY_MODEL, {})


def _why_not_loaded_alike(patcher, gpus: int) -> str | None:
    """Why workers could not load what `patcher` has, or not share it; None where they can."""
    if patcher is None:
        return "ComfyUI has not loaded the model"
    if per_run.current() is None:
        return OUTSIDE
    if _is_compiled(patcher.wrappers):
        return BY_COMPILER
    if ATTENTION not in patcher.model_options["transformer_options"]:
        return "no SLA Attention is put on it"
    heads = patcher.model.diffusion_model.num_heads
    if heads % gpus:
        return f"{gpus} GPUs do not divide {heads} heads"
    if loader_of(patcher) is None:
        return "its loader does not tell how to load it again; take TurboLoader"
    if patcher.injections:
        return "a node adds modules to it"
    if patcher.weight_wrapper_patches:
        return "a node wraps its weights"
    for name, patch in patcher.object_patches.items():
        if name.startswith("diffusion_model.") and not is_ours(patch):
            return f"a node patches its {name.removeprefix('diffusion_model.')}"
    try:
        wrap((loader_of(patcher), patcher.patches))
    except UnsendableError as error:
        return f"workers cannot load it: {error}"
    return None
