"""One video on several GPUs against one of them: forward passes, diffusions, and on to pixels.

For tests/benchmarks/forward.py --gpus. This process has the first GPU and the pack's own workers
the others; they make the same random models from the same seeds in place of loading a file. A model
of two experts runs whole diffusions only, with the switch. `apart` is how far a shared pass is from
one GPU's, 0 where all bits are equal. To judge another number there is `of_rounding`: how far two
passes of one GPU are whose inputs differ by a 4096th. `levels` are of frames in 8 bits.
"""

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

SUPPORT = Path(__file__).resolve().parent
# Workers make the models by a function of this folder's.
os.environ["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])

import pack  # noqa: E402, F401
import torch  # noqa: E402
from in_comfyui import DEVICE, comfy  # noqa: E402
from random_checkpoint import random_model  # noqa: E402
from random_models import vae as random_vae  # noqa: E402
from turbodiffusion_pack.turbo_core.forward_time import MODELS, TEXT_LENGTH, Shape  # noqa: E402
from turbodiffusion_pack.turbo_core.host import gpu_workers, per_run, turbo_vae  # noqa: E402
from turbodiffusion_pack.turbo_core.host.experts import switch_experts  # noqa: E402
from turbodiffusion_pack.turbo_core.host.patch import patch_attention  # noqa: E402
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler  # noqa: E402
from turbodiffusion_pack.turbo_core.host.sequence_parallel import share_among  # noqa: E402
from turbodiffusion_pack.turbo_core.host.turbo_vae import accelerate_vae  # noqa: E402
from turbodiffusion_pack.turbo_core.parallel import parcels  # noqa: E402
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas  # noqa: E402
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings  # noqa: E402

parcels.KNOWN |= {"random_checkpoint"}
VAE_DIM = 96  # as Wan's


def model_of(shape: Shape, settings: SLASettings, seed: int = 0):
    """A random MODEL that workers can make too."""
    arguments = tuple(shape), seed, DEVICE.type
    model = random_model(*arguments)
    model.cached_patcher_init = random_model, arguments
    return patch_attention(model, settings)


def forward_of(model, shape: Shape, factor: float = 1.0) -> Callable:
    """A function that runs one forward pass, on the same inputs times `factor` for every model."""
    generator = torch.Generator().manual_seed(1)
    channels = 16, shape.in_channels - 16
    x, concat = (torch.randn(1, c, *shape.latent, generator=generator).to(DEVICE) for c in channels)
    text = torch.randn(1, TEXT_LENGTH, 4096, generator=generator).to(DEVICE)
    inputs = {
        "c_concat": concat if concat.shape[1] else None,
        "c_crossattn": text * 0.1,
        "transformer_options": {
            **model.model_options["transformer_options"],
            "wrappers": model.wrappers,
        },
    }
    sigma = torch.tensor([0.9338], device=DEVICE)
    return lambda: model.model.apply_model(factor * x, sigma, **inputs)


def diffusion_of(model, shape: Shape, steps: int) -> Callable:
    """A function that runs a whole diffusion; the latents."""
    conditions = {}
    if shape.in_channels > 16:
        conditions["concat_latent_image"] = torch.zeros(1, 16, *shape.latent)
        conditions["concat_mask"] = torch.ones(1, 1, *shape.latent)
    text = torch.randn(1, TEXT_LENGTH, 4096, generator=torch.Generator().manual_seed(2)) * 0.1
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[text, conditions]]})
    guider.set_cfg(1.0)
    noise = torch.randn(1, 16, *shape.latent, generator=torch.Generator().manual_seed(3))
    sampler = rcm_sampler("ode" if conditions else "sde")
    sigmas = rcm_sigmas(steps, 200.0)
    latent = torch.zeros_like(noise)
    return lambda: guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0)


def seconds(run: Callable, runs: int, warm: bool = False) -> tuple[torch.Tensor, float, float]:
    """The last result, the time of the first run, and the median of `runs` after it; or if all is
    `warm`, of all."""
    times = []
    for _ in range(runs if warm else 1 + runs):
        _wait()
        start = time.perf_counter()
        found = run()
        _wait()
        times.append(time.perf_counter() - start)
    return found, times[0], statistics.median(times if warm else times[1:])


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def measure_forwards(model, shape: Shape, gpus: int, runs: int) -> dict:
    """Forward passes of one GPU and of several."""
    comfy.model_management.load_models_gpu([model])
    with per_run.keep():
        ordinary, _, one = seconds(forward_of(model, shape), runs)
        beside = forward_of(model, shape, 1 + 2**-12)()
        shared, first, many = seconds(forward_of(share_among(model, gpus), shape), runs)
    return {
        "forward_ms": {1: round(1000 * one, 1), gpus: round(1000 * many, 1)},
        "speed_up": round(one / many, 3),
        "start_s": round(first, 1),
        "apart": relative(shared, ordinary),
        "of_rounding": relative(beside, ordinary),
    }


def measure_diffusions(model, shape: Shape, options, warm: bool) -> dict:
    """Whole diffusions, and from the sampler's start to pixels in memory."""
    vae = accelerate_vae(comfy.sd.VAE(sd=random_vae(VAE_DIM)))
    times, latents, decoded, frames = {}, {}, {}, {}
    for gpus in (1, options.gpus):
        diffuse = diffusion_of(share_among(model, gpus), shape, options.steps)
        latents[gpus], _, times[gpus] = seconds(diffuse, options.runs, warm)
        found = gpu_workers.running_workers() if gpus > 1 else None
        with mock.patch.object(turbo_vae, "running_workers", return_value=found):
            frames[gpus], _, decoded[gpus] = seconds(partial(vae.decode, latents[gpus]), 1)
    whole = {gpus: times[gpus] + decoded[gpus] for gpus in times}
    return {
        "steps": options.steps,
        "diffusion_s": {gpus: round(t, 2) for gpus, t in times.items()},
        "decode_s": {gpus: round(t, 2) for gpus, t in decoded.items()},
        "to_pixels_s": {gpus: round(t, 2) for gpus, t in whole.items()},
        "to_pixels_speed_up": round(whole[1] / whole[options.gpus], 3),
        "latents_apart": relative(latents[options.gpus], latents[1]),
        **levels(frames[options.gpus], frames[1]),
    }


def levels(found: torch.Tensor, expected: torch.Tensor) -> dict:
    """How far the frames [B, T, H, W, 3] of a video are, in levels of 8 bits."""
    mean = largest = 0
    for pair in zip(found.flatten(0, 1), expected.flatten(0, 1), strict=True):
        one, other = (x.to(DEVICE).mul(255).round() for x in pair)
        apart = (one - other).abs()
        mean += float(apart.mean()) / found.shape[0] / found.shape[1]
        largest = max(largest, int(apart.max()))
    return {"levels_mean": mean, "levels_largest": largest}


def measure(name: str, settings: SLASettings, options, shape: Shape | None = None) -> Iterator:
    """What is measured of one model, as it comes."""
    shape = shape or MODELS[name]
    about = {"model": name, "attention": settings.attention, "gpus": options.gpus}
    about["peer_access"] = os.environ.get("NCCL_P2P_DISABLE", "0") == "0"
    model, experts = model_of(shape, settings), name.startswith("A14B")
    if experts:
        model = switch_experts(model, model_of(shape, settings, 1), 0.9)
    else:
        yield about | measure_forwards(model, shape, options.gpus, options.runs)
    if options.steps:
        yield about | measure_diffusions(model, shape, options, warm=not experts)


def main(options) -> None:
    """Lines of JSON for each model of forward.py's options."""
    for name in options.models:
        for attention in options.attention:
            for found in measure(name, SLASettings(attention, options.topk[0]), options):
                sys.stdout.write(json.dumps(found) + "\n")
                sys.stdout.flush()
            comfy.model_management.unload_all_models()
            gc.collect()  # a model holds itself through its patched forwards
    gpu_workers.stop()
