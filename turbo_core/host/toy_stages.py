"""The stages of the toy world alone: its VAE, its data, and what all its models make of it."""

import argparse
import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..checkpoint.write import write_safetensors
from ..training import run_folder
from ..training.batches import write_data
from ..training.loop import Values, train
from ..training.presets import Preset
from ..training.processes import say
from ..training.recorded import wanted
from ..training.report import Report
from ..training.toy.clips import UNCONDITIONAL, shards
from ..training.toy.recipe import recipe
from ..training.toy.vae import COLUMNS, HELD_OUT, VAETraining, fold, latent_spread, measured
from ..training.toy.world import draw
from . import standalone  # noqa: F401 - first of all that imports ComfyUI
from .toy_evaluate import VAE_FILE, evaluate
from .wan_vae import LatentVAE, TrainableVAE, latent_statistics

AT_ONCE = 16  # clips that are measured
MOST_APART = 1000  # steps between checkpoints of the VAE, which takes fewer than the networks
STORED = torch.bfloat16  # what ComfyUI computes the VAE in on a GPU


def vae(args: argparse.Namespace, device: torch.device) -> None:
    """RUN/vae/vae.safetensors: a small Wan VAE that ComfyUI's VAELoader takes."""
    if (asked := recipe(args, "vae")) is None:
        return
    preset, settings, told = asked
    with run_folder.open(args.out, "vae", told) as folder:
        if folder.finished is not None:
            say(f"{folder.path} is finished")
            return
        torch.manual_seed(preset.seed)
        network = TrainableVAE(settings.dim).to(device)
        by_graph = wanted(preset, device)
        training = VAETraining(network, settings, preset.video, preset.seed, by_graph)
        report = Report(folder.path, list(COLUMNS), settings.steps)

        def step(n: int) -> Values:
            with _convolutions(preset.deterministic):
                return training.step(n)

        every = (min(preset.save_every, MOST_APART), training.sample, preset.sample_every)
        train(folder, report, training.state(), step, *every)
        facts = _fit_for_wan(network, preset, device)
        tensors = {name: t.to(STORED) for name, t in network.wan.state_dict().items()}
        folder.finish(lambda part: write_safetensors(part / VAE_FILE, tensors), **facts)
        say(f"{folder.path / VAE_FILE}: {facts}")


def data(args: argparse.Namespace, device: torch.device) -> None:
    """RUN/data: clips of the world as latents, with their prompts; --base names another VAE."""
    if (asked := recipe(args, "data")) is None:
        return
    preset, settings, told = asked
    file = args.base or run_folder.RunFolder(args.out, "vae").sibling("vae") / VAE_FILE
    with run_folder.open(args.out, "data", {**told, "vae": str(args.base or "vae")}) as folder:
        if folder.finished is not None:
            say(f"{folder.path} is finished")
            return
        encode = LatentVAE(file, device).encode
        made = shards(
            encode, settings, preset.video, preset.seed, preset.sizes.in_channels == 36, device
        )

        def write(part: Path) -> None:
            shutil.copyfile(file, part / VAE_FILE)
            write_data(part, _counted(made, settings.samples), UNCONDITIONAL)

        folder.finish(write)


def decoder(folder: Path, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What makes videos [B, T, H, W, 3] of latents; None where `folder` has no toy's."""
    file = folder / VAE_FILE
    return LatentVAE(file, device).videos if file.exists() else None


STAGES: dict[str, Callable[[argparse.Namespace, torch.device], None]] = {
    "vae": vae,
    "data": data,
    "evaluate": evaluate,
}


@contextlib.contextmanager
def _convolutions(deterministic: bool) -> Iterator[None]:
    """Take the fastest of cuDNN's convolutions, which may be one that sums in any order.

    Training has few sizes and meets each often. What is computed a few times is sooner done without
    trying all of them.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = not deterministic, deterministic
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


def _fit_for_wan(network: TrainableVAE, preset: Preset, device: torch.device) -> dict:
    """Scale the latents for Wan's, round the weights as they are stored, and measure that."""
    counts = range(0, preset.vae.measured, AT_ONCE)
    clips = [
        draw(preset.seed, HELD_OUT + at, min(AT_ONCE, preset.vae.measured - at)).to(device)
        for at in counts
    ]
    fold(network.wan, latent_spread(network, clips, preset.video), latent_statistics())
    network.to(STORED).to(STORED if device.type == "cuda" else torch.float32)
    return measured(network, clips, preset.video)


def _counted(made: Iterator[dict], samples: int) -> Iterator[dict]:
    """Shards as they come, each told."""
    done = 0
    for shard in made:
        yield shard
        done += len(shard["latents"])
        say(f"data: {done} of {samples} samples")
