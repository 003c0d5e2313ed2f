"""rCM as a ComfyUI SAMPLER."""

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers

from ..rcm import ode_step, sde_step

MODES = ("sde", "ode")
# Odd and far from any small number: seeds that users count up never meet their own step noise.
STEP_NOISE_SEED = 0x9E3779B97F4A7C15


def rcm_sampler(mode: str) -> comfy.samplers.KSAMPLER:
    """A SAMPLER that follows rCM: mode "sde" adds fresh noise each step, "ode" adds none.

    Raises:
        ValueError: another mode.
    """
    if mode not in MODES:
        raise ValueError(f"rCM's mode must be one of {', '.join(MODES)}, got {mode!r}")
    return comfy.samplers.KSAMPLER(sample_rcm, extra_options={"mode": mode})


def sample_rcm(
    model, x, sigmas, extra_args=None, callback=None, disable=None, mode="sde", noise_sampler=None
):
    """Sample from noise level sigmas[0] down to sigmas[-1]; the k-diffusion sampler interface.

    Args:
        model: denoiser, called as model(x, sigma [B]) -> denoised.
        x: start, sigmas[0] * noise + (1 - sigmas[0]) * latent.
        sigmas: rectified-flow sigmas, descending.
        mode: "sde" or "ode".
        noise_sampler: source of the SDE's noise, called as noise_sampler(sigma, sigma_next).

    Raises:
        ValueError: the MODEL is not a flow model.
    """
    extra_args = extra_args or {}
    _require_flow(model)
    if noise_sampler is None:
        noise_sampler = step_noise_sampler(x, extra_args.get("seed"))
    ones = x.new_ones([x.shape[0]])
    is_last = (sigmas[1:] == 0).tolist()  # at once: each look waits for the GPU
    for i in comfy.k_diffusion.sampling.trange(len(sigmas) - 1, disable=disable):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = model(x, sigma * ones, **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        if is_last[i]:
            x = denoised
        elif mode == "sde":
            x = sde_step(denoised, noise_sampler(sigma, sigma_next), sigma_next)
        else:
            x = ode_step(x, denoised, sigma, sigma_next)
    return x


def step_noise_sampler(x, seed: int | None):
    """ComfyUI's noise sampler for x, seeded never to repeat the initial noise of `seed`."""
    if seed is not None:
        # One below 2**64, because newer hosts add 1 to it on the CPU.
        seed = (seed + STEP_NOISE_SEED) % (2**64 - 1)
    return comfy.k_diffusion.sampling.default_noise_sampler(x, seed=seed)


def _require_flow(model) -> None:
    model_sampling = model.inner_model.inner_model.model_sampling
    if not isinstance(model_sampling, comfy.model_sampling.CONST):
        raise ValueError(
            "rCM samples rectified-flow models such as Wan, got a MODEL with "
            f"{type(model_sampling).__mro__[1].__name__} sampling. Use another sampler for it."
        )
