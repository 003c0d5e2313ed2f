"""Times Wan 2.1's VAE on this GPU: ComfyUI's own, and the same behind TurboVAE.

    COMFYUI_DIR=/path/ComfyUI python tests/benchmarks/vae.py --sizes 832x480x81 1280x720x81
    ... vae.py --sizes 832x480x81 --strips 1 2 3    TurboVAE in so many strips as well
    ... vae.py --sizes 1280x720x81 --kernels        where TurboVAE's time goes

Full width, random weights in bf16. Prints for decode and encode: the first run and the median of
warm ones as a node sees them (memory to memory), the model alone, the highest memory that torch
held on the GPU, and how far TurboVAE's result is from the host's and both from the host's in fp32.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
arguments, sys.argv = sys.argv, sys.argv[:1]

import in_comfyui  # noqa: E402, F401 - starts ComfyUI
import older_cards  # noqa: E402
import pack  # noqa: E402, F401
from comfy.ldm.wan.vae import WanVAE  # noqa: E402
from comfy.model_management import load_models_gpu  # noqa: E402
from comfy.sd import VAE  # noqa: E402
from gpu_timing import kernel_times  # noqa: E402
from tiny_models import VAE_CONFIG, vae_tensor  # noqa: E402
from turbodiffusion_pack.turbo_core.host.turbo_vae import TurboVAE, accelerate_vae  # noqa: E402

DIM = 96
GB = 1e9


def random_vae(dtype: torch.dtype) -> VAE:
    """The host's VAE at full width; whatever its dtype, its weights are those of bf16."""
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in WanVAE(**{**VAE_CONFIG, "dim": DIM}).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {n: vae_tensor(n, shape, generator).bfloat16() for n, shape in shapes.items()}
    return VAE(sd={n: t.to(dtype) for n, t in tensors.items()}, dtype=dtype)


def inputs(size: str) -> dict[str, torch.Tensor]:
    """What is decoded and encoded of a size such as 832x480x81."""
    width, height, frames = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, (frames + 3) // 4, height // 8, width // 8, generator=generator)
    coarse = torch.rand(1, 3, frames // 4 + 1, height // 16, width // 16, generator=generator)
    video = torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear")
    return {"decode": latents, "encode": video[0].movedim(0, -1).contiguous()}


def timed(run: Callable, runs: int) -> tuple[torch.Tensor, float, float, float]:
    """The result, the first time and the median of `runs` more in seconds, and the peak in GB."""
    times = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(1 + runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return out, times[0], statistics.median(times[1:]), torch.cuda.max_memory_allocated() / GB


def model_seconds(vae: VAE, direction: str, x: torch.Tensor) -> float:
    """The model alone, whole, from the GPU to the GPU."""
    if direction == "encode":
        x = 2 * x.movedim(-1, 0).unsqueeze(0) - 1
    x = x.to(vae.device, vae.vae_dtype)
    run = getattr(vae.first_stage_model, direction)
    return timed(lambda: run(x), 1)[2]


def psnr(x: torch.Tensor, exact: torch.Tensor) -> float:
    """In dB; of latents, whose range is not 1, relative to their deviation."""
    error = (x - exact).double().square().mean()
    scale = 1.0 if exact.shape[-1] == 3 else exact.double().var()
    return float(10 * (scale / error).log10())


def in_strips(turbo: TurboVAE, direction: str, x: torch.Tensor, count: int) -> Callable:
    run = getattr(turbo, f"_{direction}")
    x = x if direction == "decode" else x.unsqueeze(0)
    return lambda: run(x, count)


def measure(host: VAE, turbo: TurboVAE, direction: str, x: torch.Tensor, options) -> torch.Tensor:
    """Prints the lines of one direction; the host's result and TurboVAE's."""
    results = []
    for name, vae in (("ComfyUI", host), ("TurboVAE", turbo)):
        out, first, median, peak = timed(lambda vae=vae: getattr(vae, direction)(x), options.runs)
        shape = x.shape if direction == "decode" else (1, 3, *x.shape[:3])
        asked = getattr(vae, f"memory_used_{direction}")(shape, vae.vae_dtype) / GB
        alone = model_seconds(vae, direction, x)
        say(
            f"  {direction} {name:9} {median:6.2f} s ({first:.2f} first), model alone {alone:.2f}, "
            f"peak {peak:.2f} GB, asked for {asked:.2f}"
        )
        results.append(out)
    say(f"  {direction} TurboVAE from ComfyUI: {psnr(results[1], results[0]):.1f} dB")
    for count in options.strips:
        out, _, median, peak = timed(in_strips(turbo, direction, x, count), 1)
        apart = psnr(out, results[1])
        say(f"    in {count} strips {median:6.2f} s, peak {peak:.2f} GB, {apart:.1f} dB from above")
    if options.kernels:
        for row in kernel_times(lambda: getattr(turbo, direction)(x))[:16]:
            say(f"    {row.ms:8.1f} ms {row.calls:6} x {row.kernel[:90]}")
    return results


def compare_to_float32(host: VAE, turbo: TurboVAE) -> None:
    """How far bf16 is from fp32 in both, on a small video."""
    exact, small = random_vae(torch.float32), inputs("416x240x17")
    torch.backends.cudnn.allow_tf32 = False
    for direction, x in small.items():
        wanted, ours, theirs = (getattr(v, direction)(x) for v in (exact, turbo, host))
        say(
            f"{direction} 416x240x17: ComfyUI in bf16 {psnr(theirs, wanted):.1f} dB from fp32, "
            f"TurboVAE {psnr(ours, wanted):.1f}, the two {psnr(ours, theirs):.1f} apart"
        )
        frames = [f"{psnr(a, b):.0f}" for a, b in zip(ours[0], theirs[0], strict=True)]
        if direction == "decode":
            say(f"  frame by frame: {' '.join(frames)}")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["832x480x81", "1280x720x81"])
    parser.add_argument("--strips", nargs="*", type=int, default=[])
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--card", help="as on an older card, see tests/support/older_cards.py")
    options = parser.parse_args(arguments[1:])
    if options.card:
        older_cards.play(options.card)
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with torch.inference_mode():
        host = random_vae(torch.bfloat16)
        turbo = accelerate_vae(host)
        load_models_gpu([host.patcher])
        compare_to_float32(host, turbo)
        for size in options.sizes:
            say(size)
            for direction, x in inputs(size).items():
                measure(host, turbo, direction, x, options)


if __name__ == "__main__":
    main()
