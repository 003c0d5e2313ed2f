"""rCM as ComfyUI's scheduler `rcm`, for KSampler and every node that takes a scheduler."""

import logging
import weakref

import comfy.model_sampling
import comfy.samplers
from comfy.patcher_extension import CallbacksMP

from ..rcm import TEXT_TO_VIDEO, rcm_sigmas
from .options import SIGMA_MAX
from .patch_owner import is_ours, mark_as_ours

NAME = "rcm"

# A scheduler is not given the MODEL but its model_sampling, which ModelSamplingSD3 and others
# replace without a trace: the MODELs are asked whose it is.
_carriers = weakref.WeakSet()

log = logging.getLogger(__name__)


def register_scheduler() -> None:
    """Add `rcm` to ComfyUI's schedulers; once, however often the pack is loaded."""
    known = comfy.samplers.SCHEDULER_HANDLERS.get(NAME)
    if known is not None and not is_ours(known.handler):
        log.warning(
            "TurboDiffusion: another node pack has a scheduler named %s, which stays as it is. "
            "For TurboDiffusion's use the rCMSampler node.",
            NAME,
        )
        return
    comfy.samplers.SCHEDULER_HANDLERS[NAME] = comfy.samplers.SchedulerHandler(rcm_schedule)
    # In place: the nodes' combos hold these lists, which are one unless somebody replaced one.
    for names in (comfy.samplers.SCHEDULER_NAMES, comfy.samplers.KSampler.SCHEDULERS):
        if NAME not in names:
            names.append(NAME)


@mark_as_ours
def rcm_schedule(model_sampling, steps: int):
    """rCM's sigmas, float32 [steps + 1], from the sigma_max that the MODEL carries, else 80.

    They are final: the shift of `model_sampling` has no part in them.

    Raises:
        ValueError: the MODEL is not a flow model.
    """
    if not isinstance(model_sampling, comfy.model_sampling.CONST):
        raise ValueError(
            f"scheduler {NAME} is for rectified-flow models such as Wan, got a MODEL with "
            f"{type(model_sampling).__mro__[1].__name__} sampling. Use another scheduler for it."
        )
    return rcm_sigmas(steps, _sigma_max_of(model_sampling))


def carry_sigma_max(model, sigma_max: float) -> None:
    """Let scheduler `rcm` start `model`, and every later clone of it, from `sigma_max`."""
    model.model_options["transformer_options"][SIGMA_MAX] = float(sigma_max)
    _carriers.add(model)
    if not model.callbacks.get(CallbacksMP.ON_CLONE, {}).get(SIGMA_MAX):
        model.add_callback_with_key(CallbacksMP.ON_CLONE, SIGMA_MAX, _note_clone)


def carried_sigma_max(model) -> float:
    """The sigma_max that `model` carries, 80 if none."""
    return model.model_options["transformer_options"].get(SIGMA_MAX, TEXT_TO_VIDEO)


def _note_clone(original, clone) -> None:
    _carriers.add(clone)


def _sigma_max_of(model_sampling) -> float:
    """What the MODEL with this model_sampling carries; all that share one are clones of one."""
    for model in list(_carriers):
        if model.get_model_object("model_sampling") is model_sampling:
            return carried_sigma_max(model)
    return TEXT_TO_VIDEO
