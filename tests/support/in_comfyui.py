"""ComfyUI inside the test process, and the pack's own modules on top of it.

Importing this starts ComfyUI once (on the CPU where there is no GPU); without a ComfyUI at hand
every test module that imports it is skipped.
"""

import contextlib
import inspect
import sys

import comfyui_install
import dynamic_vram
import pytest
import torch

_folder = comfyui_install.find()
if _folder is None:
    pytest.skip("no ComfyUI found, set COMFYUI_DIR or run make test", allow_module_level=True)
if str(_folder) not in sys.path:
    sys.path.insert(0, str(_folder))
    sys.argv = ["comfyui"] if torch.cuda.is_available() else ["comfyui", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    if dynamic_vram.wanted():
        dynamic_vram.enable()

import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.utils  # noqa: E402

__all__ = ["comfy"]

DEVICE = comfy.model_management.get_torch_device()
# Dynamic VRAM: the host keeps weights in RAM as the file has them, and casts and patches a copy of
# each when it is used.
DYNAMIC = dynamic_vram.wanted()


def pad_context(context: torch.Tensor) -> torch.Tensor:
    """Golden text features [B, 40, 64] as umT5's [B, 512, 4096]; those of 4096 as they are."""
    if context.shape[2] == 4096:
        return context
    padded = torch.zeros(len(context), 512, 4096)
    padded[:, : context.shape[1], : context.shape[2]] = context
    return padded


def velocity(
    model, x: torch.Tensor, context: torch.Tensor, timestep: float, image=None
) -> torch.Tensor:
    """One forward pass of `model` the way a sampler drives it; x [B, C, T, H, W].

    `image` [B, 20, T, H, W] is what an image-to-video model sees beside x: mask and latent.
    """
    comfy.model_management.load_models_gpu([model])
    return apply(model, x, context, timestep, image)


def apply(
    model, x: torch.Tensor, context: torch.Tensor, timestep: float, image=None
) -> torch.Tensor:
    """One forward pass of `model` with its weights where they are now."""
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    sigma = torch.full((len(x),), timestep / 1000, dtype=torch.float64, device=DEVICE)
    x = x.float().to(DEVICE)
    denoised = model.model.apply_model(
        x,
        sigma,
        c_concat=None if image is None else image.float().to(DEVICE),
        c_crossattn=pad_context(context).to(DEVICE),
        transformer_options=options,
    )
    return (x - denoised) / sigma.float().view(-1, 1, 1, 1, 1)


@contextlib.contextmanager
def streamed(model):
    """`model` loaded as where no weight fits on the GPU: each is fetched for each use."""
    model.detach()
    with dynamic_vram.full() if DYNAMIC else contextlib.nullcontext():
        if DYNAMIC:
            comfy.model_management.load_models_gpu([model])
        else:
            model.patch_model(device_to=DEVICE, lowvram_model_memory=1)
        yield
    model.detach()


def hookable(model):
    """`model` as the patcher that the host itself takes where prompts have hooks."""
    return model.get_non_dynamic_delegate() if DYNAMIC else model


def random_weights(kind, **options) -> dict[str, torch.Tensor]:
    """A random state dict of a Wan model of the class `kind`."""
    # Not with the host's operations: with dynamic VRAM its Linears have no weights before a file's.
    shapes = kind(**options, operations=torch.nn, device="meta").state_dict()
    generator = torch.Generator().manual_seed(0)
    return {n: 0.02 * torch.randn(t.shape, generator=generator) for n, t in shapes.items()}


def sample(
    model,
    sampler,
    sigmas,
    noise: torch.Tensor,
    context: torch.Tensor,
    seed=0,
    callback=None,
    image: torch.Tensor | None = None,
):
    """A whole run through ComfyUI's guider from an empty latent; the last state in model space."""
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[pad_context(context), image_conditioning(model, image)]]})
    guider.set_cfg(1.0)
    latent = torch.zeros_like(noise)
    out = guider.sample(
        noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=seed
    )
    return model.model.process_latent_in(out)


def image_conditioning(model, image: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What WanImageToVideo adds to a conditioning where `model` is to see `image`, mask first."""
    if image is None:
        return {}
    mask, latent = image.float().split((4, 16), dim=1)
    return {
        "concat_latent_image": model.model.process_latent_out(latent),
        "concat_mask": 1 - mask,
    }


def context_windows(model, length: int, overlap: int):
    """`model` with ComfyUI's own node for windows of `length` frames."""
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    options = {
        "context_length": length,
        "context_overlap": overlap,
        "context_schedule": "standard_static",
        "context_stride": 1,
        "closed_loop": False,
        "fuse_method": "pyramid",
        "freenoise": False,
    }
    known = inspect.signature(WanContextWindowsManualNode.execute).parameters
    chosen = {name: value for name, value in options.items() if name in known}
    return WanContextWindowsManualNode.execute(model, **chosen).args[0]
