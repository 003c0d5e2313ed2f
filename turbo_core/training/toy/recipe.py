"""What the command asks of a stage that only toys have."""

import argparse
import dataclasses
import sys

from ..error import TrainingError
from ..presets import VAE, Clips, Evaluation, Preset, chosen, settings_of
from ..processes import grouped

ALONE = ("vae", "data", "evaluate")


def check_alone(stage: str) -> None:
    """Refuse a stage that several processes cannot share.

    Raises:
        TrainingError: there are several.
    """
    if stage in ALONE and grouped():
        raise TrainingError(f"the stage {stage} uses one GPU: start it without torchrun", True)


def recipe(
    args: argparse.Namespace, stage: str
) -> tuple[Preset, VAE | Clips | Evaluation, dict] | None:
    """The preset, its recipe for the stage, and all that decides what the stage computes.

    None for --dry-run: then the recipe is written to the terminal.

    Raises:
        TrainingError: several processes; these stages are short.
        ValueError: no such preset, or one that is no toy.
    """
    check_alone(stage)
    preset = chosen(args, stage)
    settings = settings_of(preset, stage)
    plain = dataclasses.asdict(settings)
    if args.dry_run:
        frames, pixels = preset.video
        told = ", ".join(f"{name} {value}" for name, value in plain.items())
        sys.stdout.write(
            f"{stage} of preset {args.preset}: {told}; clips of {frames} frames of {pixels} x "
            f"{pixels}; nothing is started\n"
        )
        return None
    decides = {"preset": args.preset, "seed": preset.seed, "video": list(preset.video)}
    return preset, settings, {**decides, stage: plain}
