"""Times Wan 2.1's VAE on this GPU: ComfyUI's own, and the same behind TurboVAE.

    COMFYUI_DIR=/path/ComfyUI python tests/benchmarks/vae.py --sizes 832x480x81 1280x720x81
    ... vae.py --sizes 832x480x81 --strips 1 2 3    TurboVAE in so many strips as well
    ... vae.py --sizes 256x256x1 480x480x17         other sizes, of one frame and more
    ... vae.py --sizes 1280x720x81 --kernels        where TurboVAE's time goes
    ... vae.py --cudnn                              TurboVAE by torch's convolutions and attention
    ... vae.py --fastvae                            beside the package fastvae, through diffusers
    ... vae.py --same-convolution fp64              both convolve by one function: what else differs

Full width, random weights in bf16. Prints for decode and encode: a first run of 9 frames, the
median of runs as a node sees them (memory to memory), TurboVAE's model alone, the highest memory
that torch held on the GPU, how far TurboVAE's result is from the host's, and how far the first 5
frames of both are from the host's in fp32.
"""

import argparse
import functools
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
from comfy.ldm.modules.diffusionmodules.model import pytorch_attention  # noqa: E402
from comfy.ldm.wan.vae import WanVAE  # noqa: E402
from comfy.model_management import load_models_gpu  # noqa: E402
from comfy.sd import VAE  # noqa: E402
from gpu_timing import kernel_times  # noqa: E402
from one_convolution import convolve_alike  # noqa: E402
from tiny_models import VAE_CONFIG, vae_tensor  # noqa: E402
from turbodiffusion_pack.turbo_core.host import causal_vae  # noqa: E402
from turbodiffusion_pack.turbo_core.host.turbo_vae import TurboVAE, accelerate_vae  # noqa: E402

DIM = 96
GB = 1e9


def random_vae() -> VAE:
    """The host's VAE at full width in bf16."""
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in WanVAE(**{**VAE_CONFIG, "dim": DIM}).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {n: vae_tensor(n, shape, generator).bfloat16() for n, shape in shapes.items()}
    return VAE(sd=tensors, dtype=torch.bfloat16)


def inputs(size: str) -> dict[str, torch.Tensor]:
    """What is decoded and encoded of a size such as 832x480x81."""
    width, height, frames = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, (frames + 3) // 4, height // 8, width // 8, generator=generator)
    coarse = torch.rand(1, 3, frames // 4 + 1, height // 16, width // 16, generator=generator)
    size = frames, height, width
    video = torch.nn.functional.interpolate(coarse.cuda(), size, mode="trilinear")
    return {"decode": latents, "encode": video[0].movedim(0, -1).contiguous().cpu()}


def timed(run: Callable, runs: int) -> tuple[torch.Tensor, float, float]:
    """The result, the median time of `runs` in seconds, and the peak in GB."""
    times = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return out, statistics.median(times), torch.cuda.max_memory_allocated() / GB


def model_seconds(vae: VAE, direction: str, x: torch.Tensor) -> float:
    """The model alone, whole, from the GPU to the GPU; it is warm."""
    if direction == "encode":
        x = 2 * x.movedim(-1, 0).unsqueeze(0) - 1
    x = x.to(vae.device, vae.vae_dtype)
    run = getattr(vae.first_stage_model, direction)
    return timed(lambda: run(x), 1)[1]


def beginning(direction: str, x: torch.Tensor, frames: int) -> torch.Tensor:
    """Of what is decoded or encoded, so many frames of the video; causal layers see no more."""
    return x[:, :, : (frames + 3) // 4] if direction == "decode" else x[:frames]


def psnr(x: torch.Tensor, exact: torch.Tensor) -> float:
    """In dB; of latents, whose range is not 1, relative to their deviation."""
    x, exact = x.cuda(), exact.cuda()
    scale = 1.0 if exact.shape[-1] == 3 else exact.float().var()
    return float(10 * (scale / (x - exact).float().square().mean()).log10())


def measure_fastvae(latents: torch.Tensor, runs: int) -> None:
    """The decoder of the package fastvae, of diffusers' Wan 2.1 VAE, from and to RAM."""
    from diffusers import AutoencoderKLWan
    from fastvae import FastVAEDecoder

    with torch.device("cuda"):
        decoder = FastVAEDecoder.from_vae(AutoencoderKLWan().bfloat16().eval())
    run = functools.partial(decoder.decode, latents, output_device="cpu")
    first = timed(run, 1)[1]
    _, median, peak = timed(run, runs)
    say(f"  decode fastvae   {median:6.2f} s (at first {first:.2f}), peak {peak:.2f} GB")


def in_strips(turbo: TurboVAE, direction: str, x: torch.Tensor, count: int) -> Callable:
    run = getattr(turbo, f"_{direction}")
    x = x if direction == "decode" else x.unsqueeze(0)
    return lambda: run(x, count)


def measure(host: VAE, turbo: TurboVAE, direction: str, x: torch.Tensor, options) -> list:
    """Prints the lines of one direction; the host's result and TurboVAE's."""
    results, seconds = [], []
    for name, vae in (("ComfyUI", host), ("TurboVAE", turbo)):
        run = getattr(vae, direction)
        short = beginning(direction, x, 9)
        first = timed(lambda run=run, short=short: run(short), 1)[1]
        out, median, peak = timed(lambda run=run: run(x), options.runs)
        shape = x.shape if direction == "decode" else (1, 3, *x.shape[:3])
        asked = getattr(vae, f"memory_used_{direction}")(shape, vae.vae_dtype) / GB
        line = f"  {direction} {name:9} {median:7.3f} s (9 frames at first {first:.2f}), "
        if vae is turbo:
            line += f"model alone {model_seconds(vae, direction, x):.2f}, "
        say(f"{line}peak {peak:.2f} GB, asked for {asked:.2f}")
        results.append(out)
        seconds.append(median)
    apart, times = psnr(results[1], results[0]), seconds[0] / seconds[1]
    equal = 100 * float((results[1] == results[0]).float().mean())
    say(f"  {direction} TurboVAE {times:.2f} times as fast as ComfyUI, {apart:.1f} dB from it")
    say(f"    {equal:.2f} % of the values are equal")
    if direction == "decode" and x.shape[2] >= 5:
        frames = [psnr(*(out[:, t] for out in results)) for t in (0, 4, 16, -1)]
        say(f"    frames 1, 5, 17 and the last: {', '.join(f'{dB:.0f}' for dB in frames)}")
    for count in options.strips:
        out, median, peak = timed(in_strips(turbo, direction, x, count), 1)
        apart = psnr(out, results[1])
        say(f"    in {count} strips {median:6.2f} s, peak {peak:.2f} GB, {apart:.1f} dB from above")
    if options.kernels:
        rows = kernel_times(lambda: getattr(turbo, direction)(x))
        say(f"    {sum(row.ms for row in rows):8.1f} ms in all")
        for row in rows[:12]:
            say(f"    {row.ms:8.1f} ms {row.calls:6} x {row.kernel[:100]}")
    return results


def float32_of(host: VAE) -> VAE:
    """The host's VAE with the same weights in fp32, and no TF32 in it."""
    torch.backends.cudnn.allow_tf32 = False
    tensors = {name: tensor.float() for name, tensor in host.get_sd().items()}
    return VAE(sd=tensors, dtype=torch.float32)


def compare_to_float32(exact: VAE, size: str, direction: str, x: torch.Tensor, results) -> None:
    """How far both are from fp32, in their first 5 frames."""
    wanted = getattr(exact, direction)(beginning(direction, x, 5))
    axis = 1 if direction == "decode" else 2
    theirs, ours = (psnr(out.narrow(axis, 0, wanted.shape[axis]), wanted) for out in results)
    say(f"{direction} {size}: ComfyUI {theirs:.1f} dB from fp32, TurboVAE {ours:.1f}")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["832x480x81", "1280x720x81"])
    parser.add_argument("--directions", nargs="+", default=["decode", "encode"])
    parser.add_argument("--strips", nargs="*", type=int, default=[])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--cudnn", action="store_true")
    parser.add_argument("--same-convolution", choices=("fp64", "cudnn"))
    parser.add_argument("--same-norms", action="store_true", help="and torch's in between")
    parser.add_argument("--fastvae", action="store_true")
    parser.add_argument("--card", help="as on an older card, see tests/support/older_cards.py")
    options = parser.parse_args(arguments[1:])
    if options.card:
        older_cards.play(options.card)
    if options.same_convolution:
        convolve_alike(options.same_convolution, norms=options.same_norms)
    if options.cudnn:
        causal_vae.left_to_cudnn = lambda *_: "not asked for"
        causal_vae.attention_by_products = pytorch_attention
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    done = []
    with torch.inference_mode():
        host = random_vae()
        turbo = accelerate_vae(host)
        load_models_gpu([host.patcher])
        for size in options.sizes:
            say(size)
            given = inputs(size)
            for direction in options.directions:
                x = given[direction]
                done.append((size, direction, x, measure(host, turbo, direction, x, options)))
            if options.fastvae:
                measure_fastvae(given["decode"], options.runs)
        exact = float32_of(host)
        for part in done:
            compare_to_float32(exact, *part)


if __name__ == "__main__":
    main()
