"""Times the convolutions of Wan 2.1's VAE decoder at 720p on this GPU: cuDNN's, and ours.

    python tests/benchmarks/frames_conv.py
    ... frames_conv.py --card 8.9    as on an older card, where cuDNN convolves

In ms, and in TFLOP/s; of cuDNN with channels last as TurboVAE calls it, with benchmark on, and with
channels first. First how far each is from float64 where the result is rounded to bf16.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import older_cards
from gpu_timing import measure_ceilings, median_ms
from turbodiffusion_pack.kernels.dispatch import cuda_unavailable
from turbodiffusion_pack.kernels.frames_conv import frames_conv, packed

GPU = torch.device("cuda", 0)
SHAPES = (  # channels in and out, taps over time and across, frames, height, width, times a video
    (96, 96, 3, 3, 4, 720, 1280, 6),
    (192, 192, 3, 3, 4, 360, 640, 6),
    (384, 384, 3, 3, 2, 180, 320, 5),
    (192, 96, 1, 3, 4, 720, 1280, 1),
    (384, 192, 1, 3, 4, 360, 640, 1),
    (384, 384, 3, 3, 2, 90, 160, 10),
    (384, 768, 3, 1, 2, 180, 320, 1),
    (96, 3, 3, 3, 4, 720, 1280, 1),
)
PIECES = 20  # of frames in a video; of the middle, half as many


def tensors(c: int, n: int, kt: int, k: int, t: int, h: int, w: int) -> tuple[Tensor, ...]:
    x = torch.randn(1, t + kt - 1, h, w, c, device=GPU, dtype=torch.bfloat16)
    weight = torch.randn(n, c, kt, k, k, device=GPU) * (c * kt * k * k) ** -0.5
    return x, weight.bfloat16()


def by_cudnn(x: Tensor, weight: Tensor) -> Tensor:
    """As TurboVAE calls it: channels last in memory."""
    side = weight.shape[-1] // 2
    if weight.shape[2] == 1:
        pictures = functional.conv2d(x[0].permute(0, 3, 1, 2), weight[:, :, 0], None, 1, side)
        return pictures.permute(0, 2, 3, 1).contiguous()[None]
    y = functional.conv3d(x.permute(0, 4, 1, 2, 3), weight, None, 1, (0, side, side))
    return y.permute(0, 2, 3, 4, 1).contiguous()


def channels_first(x: Tensor, weight: Tensor) -> Tensor:
    side = weight.shape[-1] // 2
    return functional.conv3d(x, weight, None, 1, (0, side, side))


def report_errors() -> None:
    """Of small frames whose sides no patch divides; and parts of them must be what the whole is."""
    torch.manual_seed(0)
    for c, n, kt, k, *_ in SHAPES:
        if n == 3:
            continue
        x, weight = tensors(c, n, kt, k, 2, 43, 52)
        taps, side = packed(weight), k // 2
        exact = functional.conv3d(
            x.double().permute(0, 4, 1, 2, 3), weight.double(), None, 1, (0, side, side)
        ).permute(0, 2, 3, 4, 1)
        plain = frames_conv(x, taps, backend="cuda")
        errors = [
            float((y.double() - exact).square().mean().sqrt()) for y in (by_cudnn(x, weight), plain)
        ]
        bias = torch.randn(n, device=GPU).bfloat16()
        wide = torch.randn(1, 2, 43, 60, n, device=GPU).bfloat16()
        residual = wide[:, :, :, 3:55]
        finished = frames_conv(x, taps, bias, residual, backend="cuda")
        part = frames_conv(x[:, :, :, 7:].contiguous(), taps, backend="cuda")
        same = torch.equal(finished, (plain + bias) + residual)
        parts = torch.equal(part[:, :, :, side:], plain[:, :, :, 7 + side :])
        say(
            f"{c:4} to {n}, {kt} x {k} x {k}: from float64 cuDNN {errors[0]:.2e}, ours "
            f"{errors[1]:.2e}; with bias and residual the same {same}, a part the same {parts}"
        )


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    older_cards.parse(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    say(measure_ceilings().lines().rstrip())
    if why := cuda_unavailable(GPU):
        say(f"ours: not timed: {why}")
    else:
        report_errors()
    totals = dict.fromkeys(("cuDNN", "benchmark", "first") + (() if why else ("ours",)), 0.0)
    for c, n, kt, k, t, h, w, times in SHAPES:
        x, weight = tensors(c, n, kt, k, t, h, w)
        taps = packed(weight)
        first = x.movedim(-1, 1).contiguous()
        tflop = 2e-12 * kt * k * k * c * n * t * h * w
        runs = {
            "cuDNN": lambda x=x, weight=weight: by_cudnn(x, weight),
            "benchmark": lambda x=x, weight=weight: by_cudnn(x, weight),
            "first": lambda x=first, weight=weight: channels_first(x, weight),
            "ours": lambda x=x, taps=taps: frames_conv(x, taps, backend="cuda"),
        }
        if n == 3 or why:
            del runs["ours"]
        line = f"{c:4} to {n:3}, {kt} x {k} x {k}, {t} x {h} x {w}:"
        for name, run in runs.items():
            torch.backends.cudnn.benchmark = name == "benchmark"
            ms = median_ms(run, 5, 2)
            totals[name] += ms * times * PIECES
            line += f"  {name} {ms:.2f} ms {1000 * tflop / ms:.0f}"
        say(line)
    torch.backends.cudnn.benchmark = False
    say("of a video, ms: " + ", ".join(f"{name} {ms:.0f}" for name, ms in totals.items()))


if __name__ == "__main__":
    main()
