"""Trains: SLA fine-tuning, rCM distillation, their merge; each stage into a folder of one run.

    python turbo_core/train.py STAGE... --preset toy --out RUN [--base FILE] [--data FOLDER] ...
    torchrun --nproc-per-node 2 turbo_core/train.py STAGE... ...

A stage goes on where it was stopped, by whatever: give the same command again. Several run in turn,
without those that are finished. turbo_core/training has a README.md about stages, folders, memory
and steps.
"""

import argparse
import importlib
import importlib.util
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACK = "turbodiffusion_wan"
STAGES = ("vae", "data", "teacher", "rcm", "sla", "merge", "evaluate")
STAGES_HELP = "one or more, run in the order given; they build on each other in this one"
BASED_OTHERWISE = {"data", "teacher"}  # whose --base is not the one of the stages behind them


def main() -> None:
    """The command."""
    args = _arguments()
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            f"error: this Python {sys.version.split()[0]} has no torch, so it is not ComfyUI's: "
            "run this with the Python that starts ComfyUI"
        )
    _make_importable(args.comfyui)
    command = importlib.import_module(f"{PACK}.turbo_core.training.command")
    sys.exit(command.run(args, lambda: importlib.import_module(f"{PACK}.turbo_core.host.stages")))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python turbo_core/train.py",
        description="Trains stages of TurboDiffusion; the same command goes on after a stop.",
    )
    parser.add_argument("stages", nargs="+", choices=STAGES, help=STAGES_HELP)
    parser.add_argument("--preset", required=True, help="see turbo_core/training/presets.py")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--base", type=Path, metavar="FILE", help="checkpoint to start from")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="latents; default RUN/data")
    parser.add_argument("--sla", type=Path, metavar="FILE", help="merge: instead of RUN's own")
    parser.add_argument("--rcm", type=Path, metavar="FILE", help="sla, merge: instead of RUN's")
    parser.add_argument("--low", type=Path, metavar="RUN", help="evaluate: the low-noise expert's")
    parser.add_argument("--steps", type=int, metavar="N", help="default: the preset's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value for one of the preset's, may be given several times",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; default: cuda if there is one")
    parser.add_argument(
        "--dry-run", action="store_true", help="print memory, steps and time, and do nothing"
    )
    parser.add_argument(
        "--comfyui", type=Path, metavar="FOLDER", help="default: the one that this pack is in"
    )
    args = parser.parse_args()
    if len(args.stages) > 1:
        if args.steps is not None or args.set:
            parser.error("--steps and --set are of one stage: give it alone")
        if args.base and BASED_OTHERWISE & set(args.stages):
            parser.error("--base is not the same for data, teacher and the others: give each alone")
    return args


def _make_importable(comfyui: Path | None) -> None:
    """The pack as a package without its __init__.py, which needs a server, and ComfyUI's modules.

    This file's own folder, which Python put first, must not shadow anybody's.
    """
    pack = types.ModuleType(PACK)
    pack.__path__ = [str(ROOT)]
    sys.modules[PACK] = pack
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "turbo_core"]
    comfyui = comfyui or ROOT.parents[1]
    if (comfyui / "comfy" / "ldm" / "wan").is_dir():
        sys.path.insert(0, str(comfyui.resolve()))
    elif importlib.util.find_spec("comfy") is None:
        sys.exit(
            f"error: {comfyui} is no ComfyUI, whose Wan model is trained: give its folder with "
            "--comfyui"
        )


if __name__ == "__main__":
    main()
