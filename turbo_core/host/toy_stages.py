"""The stages of the toy world alone: its VAE, its data, and what all its models make of it."""

import argparse
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..checkpoint.write import write_safetensors
from ..training import run_folder
from ..training.batches import write_data
from ..training.error import TrainingError
from ..training.loop import train
from ..training.presets import Preset, chosen, settings_of
from ..training.processes import grouped, say
from ..training.report import Report
from ..training.toy.clips import UNCONDITIONAL, shards
from ..training.toy.vae import COLUMNS, HELD_OUT, VAETraining, fold, latent_spread, measured
from ..training.toy.world import draw
from . import standalone  # noqa: F401 - first of all that imports ComfyUI
from .toy_evaluate import VAE_FILE, evaluate
from .wan_vae import LatentVAE, TrainableVAE, latent_statistics

AT_ONCE = 16  # clips that are measured
STORED = torch.bfloat16  # what ComfyUI computes the VAE in on a GPU


def vae(args: argparse.Namespace, device: torch.device) -> None:
    """RUN/vae/vae.safetensors: a small Wan VAE that ComfyUI's VAELoader takes."""
    preset = _alone(args, "vae")
    with run_folder.open(args.out, "vae", _told(args, preset, "vae")) as folder:
        if folder.finished is not None:
            say(f"{folder.path} is finished")
            return
        torch.manual_seed(preset.seed)
        network = TrainableVAE(preset.vae.dim).to(device)
        training = VAETraining(network, preset.vae, preset.video, preset.seed)
        report = Report(folder.path, list(COLUMNS), preset.vae.steps)
        torch.backends.cudnn.benchmark = True  # few sizes, each met often
        train(
            folder,
            report,
            training.state(),
            training.step,
            preset.save_every,
            training.sample,
            preset.sample_every,
        )
        facts = _fit_for_wan(network, preset, device)
        tensors = {name: t.to(STORED) for name, t in network.wan.state_dict().items()}
        folder.finish(lambda part: write_safetensors(part / VAE_FILE, tensors), **facts)
        say(f"{folder.path / VAE_FILE}: {facts}")


def data(args: argparse.Namespace, device: torch.device) -> None:
    """RUN/data: clips of the world as latents, with their prompts; --base names another VAE."""
    preset = _alone(args, "data")
    file = args.base or run_folder.RunFolder(args.out, "vae").sibling("vae") / VAE_FILE
    told = {**_told(args, preset, "data"), "vae": str(args.base or "vae")}
    with run_folder.open(args.out, "data", told) as folder:
        if folder.finished is not None:
            say(f"{folder.path} is finished")
            return
        torch.backends.cudnn.benchmark = True
        encode = LatentVAE(file, device).encode
        made = shards(
            encode, preset.data, preset.video, preset.seed, preset.sizes.in_channels == 36, device
        )

        def write(part: Path) -> None:
            shutil.copyfile(file, part / VAE_FILE)
            write_data(part, _counted(made, preset.data.samples), UNCONDITIONAL)

        folder.finish(write)


def decoder(folder: Path, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What makes videos [B, T, H, W, 3] of the latents in `folder`; None if they are not a toy's."""
    file = folder / VAE_FILE
    return LatentVAE(file, device).videos if file.exists() else None


STAGES: dict[str, Callable[[argparse.Namespace, torch.device], None]] = {
    "vae": vae,
    "data": data,
    "evaluate": evaluate,
}


def _alone(args: argparse.Namespace, stage: str) -> Preset:
    """The preset, in a process that is alone: these stages are short."""
    if grouped():
        raise TrainingError(f"the stage {stage} uses one GPU: start it without torchrun", True)
    preset = chosen(args, stage)
    settings_of(preset, stage)
    return preset


def _told(args: argparse.Namespace, preset: Preset, stage: str) -> dict:
    """All that decides what a stage computes."""
    about = {"preset": args.preset, "seed": preset.seed, "video": list(preset.video)}
    return {**about, stage: dataclasses.asdict(settings_of(preset, stage))}


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
