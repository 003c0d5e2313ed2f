"""Looks at a sampler run and tells what the model was not made for, see ../advice.py."""

import torch
from comfy.model_management import InterruptProcessingException

from .. import run_report
from ..advice import Run, advice
from .sampler import sample_rcm

IMAGE = "concat_latent_image"  # what WanImageToVideo and its kin add to a conditioning
TIME = ("diffusion_model.time_embedding.", "diffusion_model.time_projection.")
SCALE = 8  # pixels of a latent's


def advise(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    """An OUTER_SAMPLE wrapper, for TurboDiffusion's models."""
    with run_report.run(InterruptProcessingException) as report:
        if len(sigmas) > 1 and noise.ndim == 5:
            for sentence in advice(_run(executor.class_obj, noise, sampler, sigmas)):
                report.warn(sentence)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def _run(guider, noise: torch.Tensor, sampler, sigmas: torch.Tensor) -> Run:
    wan = guider.model_patcher.get_model_object("diffusion_model")
    ours = getattr(sampler, "sampler_function", None) is sample_rcm
    cfg = getattr(guider, "cfg", 1.0)  # other packs' guiders may have anything there
    conds = [cond for group in guider.conds.values() for cond in group]
    return Run(
        dim=wan.dim,
        in_channels=wan.in_dim,
        size=(SCALE * noise.shape[-1], SCALE * noise.shape[-2]),
        sigmas=sigmas.tolist(),
        mode=sampler.extra_options["mode"] if ours else "",
        cfg=cfg if isinstance(cfg, (int, float)) else 1.0,
        has_image=any(IMAGE in cond for cond in conds),
        retimed=any(key.startswith(TIME) for key in guider.model_patcher.patches),
    )
