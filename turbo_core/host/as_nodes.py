"""A checkpoint sampled as by TurboLoader, W8A8Quantize, SLAAttentionPatch and rCMSampler."""

from pathlib import Path

import comfy.model_management
import comfy.samplers
import torch

from ..rcm import default_sigma_max, rcm_sigmas
from ..sla_settings import SLASettings
from .experts import switch_experts
from .load import load_turbo_model
from .patch import patch_attention
from .quantize_model import quantize_model
from .sampler import rcm_sampler


def quantized(paths: list[Path], topk: float, boundary: float):
    """The checkpoint at `paths`, or two experts, the high-noise one first, as an INT8 MODEL.

    Experts switch at `boundary`, see Wan22ExpertSwitch.

    It attends by SageSLA, to a share `topk` of the key blocks.
    """
    settings = SLASettings("sagesla", topk)
    models = [
        patch_attention(quantize_model(load_turbo_model(str(path)))[0], settings) for path in paths
    ]
    return models[0] if len(models) == 1 else switch_experts(*models, boundary)


@torch.inference_mode()
def sample(
    model,
    noise: torch.Tensor,
    context: torch.Tensor,
    image: torch.Tensor | None,
    steps: int,
    seed: int,
) -> torch.Tensor:
    """Latents [B, 16, T, H, W] as the network knows them, in so many rCM steps.

    Args:
        model: a MODEL of this pack.
        noise: [B, 16, T, H, W].
        context: [B, N, 4096].
        image: [B, 20, T, H, W], mask and latent, or None.
        steps: of rCMSampler.
        seed: of the noise between the steps.
    """
    sigma_max = default_sigma_max(16 if image is None else 36)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[context, _given(model, image)]]})
    guider.set_cfg(1.0)
    latents = guider.sample(
        noise.cpu(),
        torch.zeros_like(noise, device="cpu"),
        rcm_sampler("sde"),
        rcm_sigmas(steps, sigma_max),
        disable_pbar=True,
        seed=seed,
    )
    return model.model.process_latent_in(latents).to(noise)


def _given(model, image: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What WanImageToVideo adds to a conditioning."""
    if image is None:
        return {}
    mask, latent = image.split((4, 16), dim=1)
    return {
        "concat_latent_image": model.model.process_latent_out(latent),
        "concat_mask": 1 - mask[:, :1],
    }
