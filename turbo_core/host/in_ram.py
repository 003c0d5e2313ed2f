"""Weights that stay where they are in RAM while a copy of them is on the GPU.

ComfyUI without dynamic VRAM moves a model: what leaves the GPU is copied back, and pinned anew
where it is streamed. Of weights that nobody changed there is a copy in RAM already, mapped from the
file perhaps; so what leaves the GPU is dropped (Linear._apply), and what is pinned stays so.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator

import comfy.model_management
import torch

from .operations import Linear
from .versions import is_out_of_memory
from .weights import in_ram, ram_allows

_pinned = weakref.WeakKeyDictionary()  # model -> its weights that are pinned for good


def pin(model, goes_on: Callable[[], bool] = lambda: True) -> None:
    """Pin the weights of a ModelPatcher's Linears in RAM, for as long as its model lives.

    Through ComfyUI, which counts what is pinned; what there is no room for is copied more slowly.
    It reads a file that was not read yet. Another thread may do it, and end it by `goes_on`.
    """
    for op in _linears(model.model).values():
        if not goes_on():
            return
        weight = in_ram(op.weight)
        if weight is None or weight.is_pinned() or not ram_allows(op.weight.numel()):
            continue
        if comfy.model_management.pin_memory(weight):
            _pinned_of(model.model).append(weight)


def keep_pins(model, *_) -> None:
    """An ON_LOAD callback: what the host pinned of `model` to stream it stays pinned, see `pin`.

    The host would free it when it takes the model from the GPU, and pin it again the next time:
    so it does where RAM is short.
    """
    if not model.pinned or not ram_allows(0):
        return
    linears = _linears(model.model)
    for key in (model.pinned & linears.keys()) - model.backup.keys():
        if (weight := in_ram(linears[key].weight)) is not None:
            model.pinned.discard(key)
            _pinned_of(model.model).append(weight)


def drop_merged_if_short(model, unpatch_all: bool) -> None:
    """An ON_DETACH callback: what is merged, see merged.py, goes with the model where RAM is short.

    Else it is there when the model comes again, as an expert does in each run; the host, which does
    not know of it, could not have it back.
    """
    if unpatch_all and not ram_allows(0):  # not so where one of its clones is deleted
        _drop_merged(model)


@contextlib.contextmanager
def let_go(*models) -> Iterator[None]:
    """Where the GPU's memory runs out in here, nothing of these ModelPatchers stays pinned or
    merged in RAM: the host gives up all that it can then, and so does this."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            for model in models:
                _drop_merged(model)
                _unpin(_pinned.get(model.model, []))
        raise


def fit_together(models: list, activations: int) -> bool:
    """Whether the GPU has room for all of these ModelPatchers and for so many bytes besides."""
    device = models[0].load_device
    loaded = comfy.model_management.current_loaded_models
    room = comfy.model_management.get_free_memory(device) + sum(
        other.model_loaded_memory()
        for other in loaded
        if other.device == device and other.model is not None
    )
    return sum(model.model_size() for model in models) + activations <= room


def _drop_merged(model) -> None:
    if model.load_device.type == "cuda":
        torch.cuda.synchronize(model.load_device)  # copies from there may be under way
    for op in _linears(model.model).values():
        vars(op).pop("merged", None)


def _linears(base: torch.nn.Module) -> dict[str, Linear]:
    """By the name of their weight."""
    named = base.named_modules()
    return {f"{name}.weight": op for name, op in named if isinstance(op, Linear)}


def _pinned_of(base: torch.nn.Module) -> list[torch.Tensor]:
    if base not in _pinned:
        _pinned[base] = []
        weakref.finalize(base, _unpin, _pinned[base]).atexit = False
    return _pinned[base]


def _unpin(weights: list[torch.Tensor]) -> None:
    while weights:
        comfy.model_management.unpin_memory(weights.pop())
