"""Room on the GPU for a model that is about to run: made at once, or done without by a guest.

With dynamic VRAM the host makes room page by page, when a weight or an activation asks for it, and
waits for the GPU each time: then a block's weights no longer come while the one before computes.
Two experts that do not fit together would change places twice in each run. Where the second one has
few steps no more bytes come if it is streamed in each of them, as a guest beside the first, which
stays where it is. And pages that activations will take again are not given to weights at all: they
would lie beside what those are streamed through, of which there is no less.
"""

import contextlib
from collections.abc import Iterator

import comfy.model_management
import comfy.sampler_helpers
from comfy.model_management import VRAMState

from .memory import is_told
from .options import GUEST_OF
from .versions import give_way, is_dynamic, keep_pages

GUEST_STEPS = 2  # as many bytes come in so many steps as by changing places
STREAMING = VRAMState.LOW_VRAM, VRAMState.NORMAL_VRAM, VRAMState.NO_VRAM


def around_loading(executor, model, noise_shape, conds, model_options=None, **others):
    """A PREPARE_SAMPLING wrapper: the host loads `model` for a run."""
    stays = (model_options or {}).get("transformer_options", {}).get(GUEST_OF)
    taken = _taken_beside(model, noise_shape, conds) if is_dynamic(model) else None
    if taken is not None and stays is None:
        _make_room(model, taken)
    with _staying(stays) if stays is not None else contextlib.nullcontext():
        loaded = executor(model, noise_shape, conds, model_options=model_options, **others)
    if stays is not None:
        give_way(model)
    if taken is not None and is_told(model):
        _keep_what_stays(model, taken)
    return loaded


def comes_in_parts(model) -> bool:
    """Whether the host streams of `model` what the GPU has no room for. With --highvram, on memory
    that CPU and GPU share and by DirectML it loads all of it, whatever else has to leave for that;
    and --disable-smart-memory asks that all else leaves."""
    management = comfy.model_management
    streams = management.lowvram_available and management.vram_state in STREAMING
    return is_dynamic(model) or (streams and not management.DISABLE_SMART_MEMORY)


def as_guest_of(stays, options: dict) -> dict:
    """The model_options that the host loads a guest with, beside the ModelPatcher that stays."""
    return {**options, "transformer_options": {**options["transformer_options"], GUEST_OF: stays}}


def leave(guest) -> None:
    """What a guest has of the GPU goes to who comes next, such as a decoder; with dynamic VRAM it
    does so by itself. The host would have taken it for the next run of the expert that stays."""
    if not is_dynamic(guest) and guest.loaded_size() < guest.model_size():
        guest.partially_unload(guest.offload_device, guest.loaded_size())


def _taken_beside(model, noise_shape, conds) -> float:
    """Bytes of the GPU that are not for the weights of `model` while it runs."""
    activations = comfy.sampler_helpers.estimate_memory(model, noise_shape, conds)[1]
    return activations + comfy.model_management.minimum_inference_memory()


def _make_room(model, beside: float) -> None:
    """Have the other models give up at once what `model` and what is taken `beside` it lack."""
    management, device = comfy.model_management, model.load_device
    taken = model.model_size() - model.loaded_size() + beside
    lacking = taken - management.get_free_memory(device)
    for loaded in reversed(management.current_loaded_models):  # the last one to be loaded is first
        other = loaded.model
        if lacking <= 0:
            return
        if loaded.device == device and is_dynamic(other) and not model.is_clone(other):
            lacking -= other.partially_unload(other.offload_device, lacking)


def _keep_what_stays(model, beside: float) -> None:
    """Let the weights of `model` have the pages only that what is taken `beside` it will leave."""
    free = comfy.model_management.get_free_memory(model.load_device)
    left = free + model.loaded_size() - beside
    if left < model.model_size():
        keep_pages(model, max(left, 0))


@contextlib.contextmanager
def _staying(model) -> Iterator[None]:
    """While this lasts the host makes no room by unloading `model`, if all of it is there."""
    loaded = comfy.model_management.current_loaded_models
    whole = model.loaded_size() >= model.model_size()
    kept = next((one for one in loaded if whole and one.model is model), None)
    if kept is None:
        yield
        return
    older = loaded[loaded.index(kept) + 1 :]
    loaded.remove(kept)
    kept.currently_used = False  # as of all that the host asks for room
    try:
        yield
    finally:
        newer = [one for one in loaded if all(one is not other for other in older)]
        loaded.insert(len(newer), kept)
