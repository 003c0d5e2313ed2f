"""The stage evaluate: every model of a toy run, examined on the same prompts and noise."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..checkpoint import read_checkpoint
from ..checkpoint.names import PROJ_L
from ..rcm import default_sigma_max, rcm_angles
from ..training import run_folder
from ..training.batches import Batch
from ..training.presets import SLA, Evaluation, Preset
from ..training.processes import say
from ..training.samplers import euler, few_steps, shifted_levels
from ..training.teacher import GUIDANCE, SIGMA_MAX, teacher_samples
from ..training.toy import vae as toy_vae
from ..training.toy.clips import UNCONDITIONAL, conditioned, contexts
from ..training.toy.evaluate import Examination, Sample, as_csv, markdown, pictures, some
from ..training.toy.measures import LEVELS, velocity_errors
from ..training.toy.recipe import recipe
from ..training.toy.verdict import verdicts
from ..training.toy.words import widen
from ..training.toy.world import Clips, corner_of_region, draw, render
from ..training.trigflow import level_of
from ..training.velocity import guided_velocity, velocity_of
from ..training.video_grid import save_grid
from .wan_network import WanNetwork, build_network, load_weights
from .wan_vae import LatentVAE

MODEL, VAE_FILE = "model.safetensors", "vae.safetensors"
STEPS = (4, 2, 1)  # of the students, and of Euler beside them
SHOWN = ("clips", "teacher", "Euler 4", "SLA", "rCM 4", "rCM 1", "merged 4", "INT8 nodes 4")
LARGEST_PICTURE = 400_000  # bytes of stages.webp, which a page may show
BOUNDARY = 0.9  # of Wan22ExpertSwitch for image to video
SHIFTS = (1.0, 3.0, 5.0)  # Euler takes the best of them
Network = Callable[..., torch.Tensor]


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """RUN/evaluate/{table.md, table.csv, stages.webp}: all models of the run side by side.

    --low names the run of the low-noise expert, where RUN is that of the high-noise one.
    """
    if (asked := recipe(args, "evaluate")) is None:
        return
    preset, settings, told = asked
    preset = as_trained(preset, args.out)
    with run_folder.open(args.out, "evaluate", {**told, "low": str(args.low)}) as folder:
        if folder.finished is not None:
            say(f"{folder.path} is finished\n\n{(folder.path / 'table.md').read_text('utf-8')}")
            return
        models = Models(args, preset, device)
        examination = examine(models, settings, preset, device)
        text = report(examination, models, settings)
        folder.finish(lambda part: _write(part, examination, text))
        say(text)


def as_trained(preset: Preset, run: Path) -> Preset:
    """The preset with SLA as the run has it, of --set or an earlier version."""
    told = run_folder.RunFolder(run, "sla").settings.get("sla")
    return dataclasses.replace(preset, sla=SLA(**told)) if told else preset


class Models:
    """The networks of a run by stage, or of two runs, one for each expert."""

    def __init__(self, args: argparse.Namespace, preset: Preset, device: torch.device):
        folders = [args.out] if args.low is None else [args.out, args.low]
        self.runs = [run_folder.RunFolder(path, "evaluate") for path in folders]
        self.preset, self.device = preset, device
        self.data = args.data or self.runs[0].sibling("data")

    def files(self, stage: str) -> list[Path]:
        """What the stage wrote, in each run."""
        return [run.sibling(stage) / MODEL for run in self.runs]

    def network(self, stage: str, sla: SLA | None = None) -> Network:
        """The stage's network, with SLA where it was trained with it, or where `sla` is given."""
        networks = [self._load(path, sla) for path in self.files(stage)]
        return networks[0] if len(networks) == 1 else experts(*networks)

    def _load(self, path: Path, sla: SLA | None) -> WanNetwork:
        checkpoint = read_checkpoint(path)
        sla = self.preset.sla if checkpoint.has_sla else sla
        network = build_network(self.preset.sizes, self.device, sla and sla_options(sla))
        projections = {
            f"blocks.{i}.{PROJ_L}.{part}": tensor
            for i, proj_l in enumerate(checkpoint.proj_l)
            for part, tensor in zip(("weight", "bias"), proj_l, strict=True)
        }
        load_weights(network, {**checkpoint.tensors, **projections})
        return network.requires_grad_(False)


def sla_options(settings: SLA) -> dict:
    """What build_network takes to attend as the preset's SLA."""
    names = ("topk", "block_q", "block_k", "feature_map")
    return {name: getattr(settings, name) for name in names}


def experts(high: Network, low: Network, boundary: float = BOUNDARY) -> Network:
    """Two networks as one: `high` at noise levels from the boundary up."""

    def network(x, timestep, context, image):
        expert = high if float(timestep[0]) >= 1000 * boundary else low
        return expert(x, timestep, context, image)

    return network


def examine(
    models: Models, settings: Evaluation, preset: Preset, device: torch.device
) -> Examination:
    """Rows of all models, the teacher's first."""
    from . import as_nodes  # all of ComfyUI's samplers, seconds that no other stage waits for

    vae = LatentVAE(models.data / VAE_FILE, device)
    clips, batch = held_out(preset, settings, vae)
    examination = Examination(
        clips, batch, vae.videos, preset.video[0], settings.at_once, preset.seed
    )
    unconditional = widen(UNCONDITIONAL).to(device)
    teacher = models.network("teacher")
    say("teacher")
    examination.set_teacher(many_steps(teacher, unconditional, settings.teacher_steps))
    examination.add("clips through the VAE", batch.latents)
    examination.add(f"teacher {settings.teacher_steps}", examination.teacher)
    for steps in STEPS:
        shift, latents = best_euler(examination, teacher, unconditional, steps)
        examination.add(f"Euler {steps} (shift {shift:g})", latents)
    add_students(examination, "rCM", models.network("rcm"), preset)
    if not preset.sla.after_rcm:  # else what it wrote is an update, and no model to sample
        tuned = many_steps(models.network("sla"), unconditional, settings.teacher_steps)
        examination.add(f"SLA {settings.teacher_steps}", examination.sampled(tuned))
    add_students(examination, "merged", models.network("merge"), preset)
    model = as_nodes.quantized(models.files("merge"), preset.sla.topk, BOUNDARY)
    for steps in STEPS:
        sample = through_nodes(as_nodes.sample, model, steps, preset.seed)
        latents = examination.sampled(sample)
        examination.add(f"INT8 nodes {steps}", latents)
    return examination


def held_out(preset: Preset, settings: Evaluation, vae: LatentVAE) -> tuple[Clips, Batch]:
    """Clips that no training saw, each prompt twice in a row with starts of its own."""
    count, first = settings.prompts, toy_vae.HELD_OUT
    drawn, other = (draw(preset.seed, at, count) for at in (first, first + count))
    again = drawn._replace(start=corner_of_region(drawn.start) + other.start / 3)
    clips = Clips(*(torch.stack(pair, 1).flatten(0, 1) for pair in zip(drawn, again, strict=True)))
    clips = clips.to(vae.mean.device)
    parts = [_encoded(vae, part, preset) for part in _parts(clips, settings.at_once)]
    latents, images = zip(*parts, strict=True)
    image = torch.cat(images) if images[0] is not None else None
    context = widen(contexts(clips, image is not None)).to(vae.mean.device)
    return clips, Batch(torch.cat(latents), context, image)


def many_steps(network: Network, unconditional: torch.Tensor, steps: int) -> Sample:
    """Guided Euler, as the teacher is used."""
    return lambda batch, noise: teacher_samples(
        network, batch, unconditional, noise, GUIDANCE, steps
    )


def best_euler(
    examination: Examination, network: Network, unconditional: torch.Tensor, steps: int
) -> tuple[float, torch.Tensor]:
    """Guided Euler of few steps: the shift that comes nearest to the teacher, and its latents."""

    def sampled(shift: float) -> torch.Tensor:
        levels = shifted_levels(steps, shift, SIGMA_MAX)
        return examination.sampled(
            lambda batch, noise: euler(
                guided_velocity(network, batch, unconditional, GUIDANCE), noise, levels
            )
        )

    found = {shift: sampled(shift) for shift in SHIFTS}
    best = min(found, key=lambda shift: examination.distance(found[shift]))
    return best, found[best]


def add_students(examination: Examination, name: str, network: Network, preset: Preset) -> None:
    """Rows of a distilled network, with 4, 2 and 1 steps."""
    sigma_max = default_sigma_max(preset.sizes.in_channels)
    for steps in STEPS:
        angles = torch.tensor(rcm_angles(steps, sigma_max)[:-1], dtype=torch.float64)
        generator = torch.Generator(examination.noise.device).manual_seed(preset.seed)

        def sample(batch: Batch, noise: torch.Tensor, angles=angles, generator=generator):
            return few_steps(velocity_of(network, batch), noise, angles, generator)

        examination.add(f"{name} {steps}", examination.sampled(sample))


def through_nodes(sample: Callable, model, steps: int, seed: int) -> Sample:
    """What the workflow of nodes makes; `sample` of as_nodes."""
    return lambda batch, noise: sample(model, noise, batch.context, batch.image, steps, seed)


@torch.no_grad()
def sla_errors(examination: Examination, models: Models, count: int) -> dict[str, dict]:
    """How far SLA's velocity is from the dense network's that it was tuned on, before its training
    and after: from the teacher's at all noise levels, or from rCM's student's at its sampler's."""
    dense, tuned, levels = "teacher", "sla", LEVELS
    if models.preset.sla.after_rcm:
        dense, tuned = "rcm", "merge"
        angles = rcm_angles(max(STEPS), default_sigma_max(models.preset.sizes.in_channels))[:-1]
        levels = [round(float(s), 3) for s in level_of(torch.tensor(angles))]
    batch = some(examination.batch, slice(0, count))
    wanted = velocity_of(models.network(dense), batch)
    students = {
        "untuned": models.network(dense, models.preset.sla),
        "tuned": models.network(tuned),
    }
    noise = examination.noise[:count]
    return {
        name: velocity_errors(velocity_of(network, batch), wanted, batch.latents, noise, levels)
        for name, network in students.items()
    }


def report(examination: Examination, models: Models, settings: Evaluation) -> str:
    """All that was measured, as Markdown."""
    errors = sla_errors(examination, models, min(settings.at_once, len(examination.noise)))
    levels = " | ".join(f"s {level}" for level in errors["tuned"])
    lines = [
        f"{len(examination.noise)} videos of {settings.prompts} prompts; floor of the distance "
        f"(teacher against itself) {examination.floor:.4g}",
        "",
        markdown(examination.rows),
        f"| SLA's velocity error | {levels} |",
        "|---|" + "--:|" * len(errors["tuned"]),
    ]
    for name, found in errors.items():
        lines.append(f"| {name} | " + " | ".join(f"{e:.4f}" for e in found.values()) + " |")
    shown = [f"{i}. {prompt}" for i, prompt in enumerate(examination.prompts(), start=1)]
    lines += ["", *verdicts(examination, errors), "", "The pictures' prompts, from the top:", ""]
    return "\n".join([*lines, *shown]) + "\n"


def _write(part: Path, examination: Examination, text: str) -> None:
    (part / "table.md").write_text(text, encoding="utf-8", newline="\n")
    (part / "table.csv").write_text(as_csv(examination.rows), encoding="utf-8", newline="\n")
    shown = [row for row in examination.rows if row.name.startswith(SHOWN)]
    grid = pictures(shown, examination.prompts())
    save_grid(part / "stages", grid, 1 + len(shown), LARGEST_PICTURE)


def _encoded(
    vae: LatentVAE, clips: Clips, preset: Preset
) -> tuple[torch.Tensor, torch.Tensor | None]:
    videos = toy_vae.pictures(render(clips, *preset.video))
    image = conditioned(vae.encode, videos) if preset.sizes.in_channels == 36 else None
    return vae.encode(videos), image


def _parts(clips: Clips, size: int) -> Iterator[Clips]:
    for at in range(0, len(clips.shape), size):
        yield clips.some(slice(at, at + size))
