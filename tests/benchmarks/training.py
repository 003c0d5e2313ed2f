"""Times training steps on this GPU, or on several: real shapes, random weights and latents.

    COMFYUI_DIR=/path/ComfyUI python tests/benchmarks/training.py --preset 1.3B-480P --stages sla
    ... torchrun --nproc-per-node 2 tests/benchmarks/training.py --preset 1.3B-480P
    ... training.py --preset toy --profile     and the kernels that the time goes to

Each GPU takes one micro-batch a step. Prints seconds a step, tokens a second over all GPUs and the
peak memory of one, for every kind of step that a stage has.
"""

import argparse
import contextlib
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
arguments, sys.argv = sys.argv[1:], sys.argv[:1]

import in_comfyui  # noqa: E402, F401 - ComfyUI comes into the process with it
import older_cards  # noqa: E402
import pack  # noqa: E402, F401
from gpu_timing import measure_ceilings, references_of  # noqa: E402
from turbodiffusion_pack.turbo_core.checkpoint.sizes import TEXT_DIM  # noqa: E402
from turbodiffusion_pack.turbo_core.host.stages import (  # noqa: E402
    choose_kernels,
    new_network,
    recorded,
    sla_options,
)
from turbodiffusion_pack.turbo_core.rcm import rcm_angles  # noqa: E402
from turbodiffusion_pack.turbo_core.training.batches import Batch  # noqa: E402
from turbodiffusion_pack.turbo_core.training.presets import (  # noqa: E402
    PRESETS,
    Preset,
    override,
)
from turbodiffusion_pack.turbo_core.training.processes import count, processes, say  # noqa: E402
from turbodiffusion_pack.turbo_core.training.rcm import RCMTraining  # noqa: E402
from turbodiffusion_pack.turbo_core.training.sla import (  # noqa: E402
    SampledSLATraining,
    SLATraining,
)
from turbodiffusion_pack.turbo_core.training.teacher import TeacherTraining  # noqa: E402

GIB = 2**30


class RandomData:
    """Latents and prompts of the preset's shapes, the same for every step."""

    def __init__(self, preset: Preset, micro_batch: int, device: torch.device):
        self.device = device
        image = preset.sizes.in_channels == 36
        size = (micro_batch, 16, *preset.latent)
        context = torch.randn(micro_batch, preset.context, TEXT_DIM, device=device)
        pictures = torch.randn(micro_batch, 20, *preset.latent, device=device) if image else None
        self.batch = Batch(torch.randn(size, device=device), context, pictures)
        self.unconditional = torch.zeros(preset.context, TEXT_DIM, device=device)

    def __len__(self) -> int:
        return len(self.batch.latents)

    def take(self, indices: torch.Tensor) -> Batch:
        return self.batch


def random_network(preset: Preset, device: torch.device, sla: dict | None = None):
    network = new_network(preset, device, sla)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.fill_(1) if ".norm" in name else weight.normal_(std=0.02)
    return network


def begin(stage: str, preset: Preset, device: torch.device):
    """The stage's training, with a batch of one micro-batch for each GPU."""
    settings = getattr(preset, stage)
    data = RandomData(preset, settings.micro_batch, device)
    network = random_network(preset, device, sla_options(settings) if stage == "sla" else None)
    replayed = recorded(preset, device)
    if stage == "teacher":
        return TeacherTraining(network, data, settings, 0, replayed)
    dense = random_network(preset, device).requires_grad_(False)
    if stage == "sla" and settings.after_rcm:
        angles = rcm_angles(preset.rcm.rollout, preset.rcm.sigma_max)[:-1]
        return SampledSLATraining(network, dense, None, angles, data, settings, 0, replayed)
    if stage == "sla":
        return SLATraining(network, dense, data, settings, 0, replayed)
    fake = random_network(preset, device)
    return RCMTraining(network, fake, dense, data, settings, 0, replayed)


def kinds_of_steps(stage: str, preset: Preset) -> dict[str, list[int]]:
    """Numbers of steps that are alike; of the rollout's lengths, which each come as often, the
    shortest and the longest: their mean is that of all."""
    if stage != "rcm":
        return {stage: [0, 1, 2, 3]}
    settings = preset.rcm
    alone, every, longest = settings.consistency_only, settings.every, settings.rollout - 1
    both = range(alone, alone + every * settings.rollout)
    fakes = [n for n in both if (n - alone) % every]
    return {
        "rcm, student by consistency alone": [0, 1] if alone else [],
        "rcm, student with its scores": [alone, alone + every * longest],
        "rcm, fake score": [fakes[0], fakes[longest]],
    }


def measure(step: Callable[[int], dict], numbers: list[int]) -> float:
    """Mean seconds of the steps."""
    times = []
    for n in numbers:
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(n)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.mean(times)


def report(stage: str, preset: Preset, device: torch.device, profiled: bool) -> None:
    """One line for every kind of step."""
    training = begin(stage, preset, device)
    batch = getattr(preset, stage).batch
    for kind, numbers in kinds_of_steps(stage, preset).items():
        if not numbers:
            continue
        if in_torch := references_of(lambda n=numbers[-1]: training.step(n)):  # and it warms up
            say(f"{kind} runs torch references, not kernels: {in_torch}")
        torch.cuda.reset_peak_memory_stats()
        seconds = measure(training.step, numbers)
        peak = torch.cuda.max_memory_allocated() / GIB
        tokens = batch * preset.tokens / seconds
        rate = f"{tokens:9,.0f} tokens/s"
        say(f"{kind:35} {seconds:8.3f} s a step of {batch}, {rate}, {peak:6.2f} GiB")
        if profiled:
            say(profile(lambda n=numbers[0]: training.step(n)))


def profile(run: Callable) -> str:
    """The 25 kernels that take longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return found.key_averages().table(sort_by="self_cuda_time_total", row_limit=25)


@contextlib.contextmanager
def clean() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="1.3B-480P")
    parser.add_argument("--stages", nargs="+", choices=("teacher", "sla", "rcm"), default=["sla"])
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--profile", action="store_true")
    args = older_cards.parse(parser, arguments)
    with processes("cuda") as device:
        say(f"{count()} x {measure_ceilings().lines()}".rstrip())
        for stage in args.stages:
            preset = override(PRESETS[args.preset], stage, args.set)
            choose_kernels(preset, device)
            settings = getattr(preset, stage)
            settings = dataclasses.replace(settings, batch=settings.micro_batch * count())
            with clean():
                chosen = dataclasses.replace(preset, **{stage: settings})
                report(stage, chosen, device, args.profile)


if __name__ == "__main__":
    main()
