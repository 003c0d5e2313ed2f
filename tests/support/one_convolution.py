"""Lets ComfyUI's VAE and TurboVAE convolve by one function, to see what else differs."""

from collections.abc import Callable
from functools import partial

import in_comfyui  # noqa: F401 - starts ComfyUI
import pack  # noqa: F401
import torch
from comfy import ops
from comfy.ldm.modules.diffusionmodules.model import pytorch_attention
from torch.nn import functional
from turbodiffusion_pack.turbo_core.host import causal_vae


def convolve_alike(sums: str, patch: Callable = setattr, norms: bool = False) -> None:
    """Have both convolve by one function, and attend by torch's.

    Args:
        sums: "fp64", rounded once, whose order does not show; or "cudnn" for what cuDNN makes of
            tensors of one size and layout. The bias is added to the rounded sums, as on a GPU.
        patch: sets an attribute, as setattr does.
        norms: have torch do what is between the convolutions, with a norm's squares summed in fp64.
    """
    for name in ("conv2d", "conv3d"):
        patch(functional, name, alike(getattr(functional, name), sums))
    patch(ops, "NVIDIA_MEMORY_CONV_BUG_WORKAROUND", False)  # it would call cuDNN by itself
    patch(causal_vae, "left_to_cudnn", lambda *_: "not asked for")
    patch(causal_vae, "attention_by_products", pytorch_attention)
    patch(causal_vae, "AT_ONCE", 1)  # as ComfyUI
    if norms:
        patch(torch.linalg, "vector_norm", partial(summed_in_fp64, torch.linalg.vector_norm))
        for name in ("causal_frames", "resample_frames"):
            patch(causal_vae, name, partial(getattr(causal_vae, name), backend="reference"))


def summed_in_fp64(norm: Callable, x, *args, dtype=None, **kwargs):
    """torch.linalg.vector_norm, which torch.norm calls, too."""
    return norm(x.double(), *args, **kwargs).to(dtype or x.dtype)


def alike(convolution: Callable, sums: str) -> Callable:
    def run(x, weight, bias=None, stride=1, padding=0, *_):
        sides = padding if isinstance(padding, tuple) else (padding,) * (x.ndim - 2)
        x = functional.pad(x, [n for side in reversed(sides) for n in (side, side)])
        dtype = torch.float64 if sums == "fp64" else x.dtype
        y = convolution(x.to(dtype).contiguous(), weight.to(dtype), None, stride).to(x.dtype)
        return y if bias is None else y + bias.unflatten(0, (-1, *[1] * (x.ndim - 2)))

    return run
