"""How far apart rounding alone takes two runs of Wan 2.1's VAE in bf16, and that strips are exact.

    COMFYUI_DIR=/path/ComfyUI python tests/benchmarks/vae_rounding.py    half a minute on a CPU

A narrow VAE with random weights on the CPU. ComfyUI's own in bf16 is compared with itself where
nothing but the order of a convolution's sums differs (they are exact, and then rounded to bf16),
with TurboVAE, and all three with float32. Then 720p's strips, with the whole.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import in_comfyui  # noqa: F401 - starts ComfyUI
import pack  # noqa: F401
from comfy.ldm.wan.vae import WanVAE
from comfy.sd import VAE
from tiny_models import VAE_CONFIG, vae_tensor
from turbodiffusion_pack.turbo_core.host.turbo_vae import TurboVAE, accelerate_vae

FRAMES, SIZE = 81, (6, 8)  # of latents: height, width
STRIPS = ((2, 160), (2, 3, 8)), ((90, 2), (2, 3))  # of 720p's length, and counts


def random_vae(dtype: torch.dtype, dim: int) -> VAE:
    config = {**VAE_CONFIG, "dim": dim}
    generator = torch.Generator().manual_seed(0)
    shapes = {n: t.shape for n, t in WanVAE(**config).state_dict().items()}
    tensors = {n: vae_tensor(n, shape, generator).bfloat16() for n, shape in shapes.items()}
    return VAE(sd={n: t.to(dtype) for n, t in tensors.items()}, dtype=dtype)


def latents(frames: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 16, (frames + 3) // 4, height, width, generator=generator)


def summed_exactly(convolution: Callable) -> Callable:
    """A layer's `_conv_forward` that sums in float64 and rounds once."""

    def run(self, x, weight, bias, *_):
        bias = None if bias is None else bias.double()
        options = self.stride, self.padding, self.dilation, self.groups
        return convolution(x.double(), weight.double(), bias, *options).to(x.dtype)

    return run


def psnr(x: Tensor, other: Tensor) -> float:
    return float(-10 * (x - other).double().square().mean().log10())


def compare_sums() -> None:
    half, exact = random_vae(torch.bfloat16, 16), random_vae(torch.float32, 16)
    z = latents(FRAMES, *SIZE)
    wanted, host, turbo = exact.decode(z), half.decode(z), accelerate_vae(half).decode(z)
    with (
        mock.patch.object(nn.Conv2d, "_conv_forward", summed_exactly(functional.conv2d)),
        mock.patch.object(nn.Conv3d, "_conv_forward", summed_exactly(functional.conv3d)),
    ):
        other = half.decode(z)
    say("dB from float32: ComfyUI, exact sums, TurboVAE; from ComfyUI: exact sums, TurboVAE")
    for name, part in (("all", slice(None)), *((f"frame {t + 1}", t) for t in (0, 4, 16, 80))):
        w, h, o, t = (out[:, part] for out in (wanted, host, other, turbo))
        values = psnr(h, w), psnr(o, w), psnr(t, w), psnr(o, h), psnr(t, h)
        say(f"{name:10}" + "".join(f"{value:8.1f}" for value in values))


def compare_strips(dtype: torch.dtype) -> None:
    turbo = accelerate_vae(random_vae(dtype, 8))
    for size, counts in STRIPS:
        z, x = latents(5, *size), torch.rand(1, 5, 8 * size[0], 8 * size[1], 3)
        for name, run, given in (
            ("decode", TurboVAE._decode, z),
            ("encode", TurboVAE._encode, x),
        ):
            whole = run(turbo, given, 1)
            apart = [float((run(turbo, given, n) - whole).abs().max()) for n in counts]
            say(f"{name} {size} in {counts} strips, {dtype}: at most {max(apart):.1e} apart")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        compare_sums()
        for kind in (torch.bfloat16, torch.float32):
            compare_strips(kind)
