"""The options that each of two experts runs with: dicts in, new dicts out.

They are ComfyUI's model_options: guidance functions, and `transformer_options` with the wrappers
{kind: {key: [functions]}} among them.
"""

from collections.abc import Callable

from comfy.model_patcher import create_model_options_clone
from comfy.patcher_extension import WrappersMP

from .options import EXPERT_BOUNDARY, EXPERT_SWITCH, SPLIT

# Options and wrappers of a sampler run rather than of a model: they go for both experts.
RUN_OPTIONS = ("context_handler", "disable_cfg1_optimization")
RUN_WRAPPERS = (WrappersMP.PREPARE_SAMPLING, WrappersMP.SAMPLER_SAMPLE)
GUIDANCE = ("sampler_cfg_function", "sampler_calc_cond_batch_function")
GUIDANCE_LISTS = ("sampler_pre_cfg_function", "sampler_post_cfg_function")


def with_switch(options: dict, predict_noise: Callable) -> dict:
    """`options` with the wrapper `predict_noise` around all else that wraps a prediction."""
    options = create_model_options_clone(options)
    wrappers = options["transformer_options"]["wrappers"]
    others = wrappers.get(WrappersMP.PREDICT_NOISE, {})
    wrappers[WrappersMP.PREDICT_NOISE] = {EXPERT_SWITCH: [predict_noise], **others}
    return options


def options_of_low(own: dict, run: dict, came_with: dict, boundary: float) -> dict:
    """What the low-noise expert runs with: its `own` options, and of a `run` what goes for both.

    Of the guidance in `run` that is what came behind the switch, from nodes and from the sampler:
    what the high-noise expert `came_with` is not for this one.
    """
    options = create_model_options_clone(own)
    inner, of_run = options["transformer_options"], run["transformer_options"]
    inner[EXPERT_BOUNDARY] = boundary
    if "sample_sigmas" in of_run:
        inner["sample_sigmas"] = of_run["sample_sigmas"]
    for kind in RUN_WRAPPERS:
        others = of_run["wrappers"].get(kind, {})
        inner["wrappers"][kind] = {**others, **inner["wrappers"].get(kind, {})}
    if shared := of_run["wrappers"].get(WrappersMP.DIFFUSION_MODEL, {}).get(SPLIT):
        others = inner["wrappers"].get(WrappersMP.DIFFUSION_MODEL, {})
        inner["wrappers"][WrappersMP.DIFFUSION_MODEL] = {**others, SPLIT: shared}
    for key in RUN_OPTIONS:
        if key in run:
            options.setdefault(key, run[key])
    return {**options, **_guidance(options, run, came_with)}


def _guidance(own: dict, run: dict, came_with: dict) -> dict:
    """Functions of guidance: a single one of the run's in place of its own, lists one by one."""
    guidance = {
        key: run[key] for key in GUIDANCE if key in run and run[key] is not came_with.get(key)
    }
    for key in GUIDANCE_LISTS:
        known = came_with.get(key, ())
        added = [function for function in run.get(key, ()) if function not in known]
        guidance[key] = [*own.get(key, ()), *added]
    return guidance
