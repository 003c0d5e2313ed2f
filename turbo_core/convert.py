"""Converts a checkpoint of any known layout into one file, without ComfyUI and without kernels.

    python turbo_core/convert.py IN OUT [--names official|comfy] [--overwrite]

Values and dtypes stay bit for bit what they are. `python -m turbo_core.convert` works too, in the
pack's folder and not in the portable ComfyUI: its Python finds no modules in the current folder.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run by its path
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    __package__ = "turbo_core"

from .checkpoint import NAMES, file_tensors, read_checkpoint
from .checkpoint.shards import SHARD
from .checkpoint.write import write_pth, write_safetensors

# The names that a file of this kind has unless others are asked for.
DEFAULT_NAMES = {".safetensors": "comfy", ".pth": "official", ".pt": "official"}


def convert(
    source: Path,
    target: Path,
    names: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the checkpoint at `source` to `target`, in the format of its suffix.

    Args:
        source: what read_checkpoint takes.
        target: a .safetensors, .pth or .pt file.
        names: see file_tensors; by default comfy for .safetensors, official for .pth and .pt.
        overwrite: whether an older `target` may be replaced.
        progress: called with (done, total) after each tensor of a .safetensors file.

    Returns:
        How many tensors were written.

    Raises:
        CheckpointError: `source` is not usable, or has no form under these names.
        ValueError: another suffix, `target` is `source`, or it has the name of one of several
            shards, which could not be read back without the others.
        OSError: `target` exists or could not be written; an older one is unchanged.
    """
    if target.suffix not in DEFAULT_NAMES:
        raise ValueError(
            f"{target} must end in {', '.join(DEFAULT_NAMES)}, got {target.suffix or 'no suffix'!r}"
        )
    if SHARD.fullmatch(target.name):
        raise ValueError(
            f"{target} has the name of one shard of several, and would be taken for it: choose a "
            "name without -00001-of-..."
        )
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target} is the file that is read: choose another name")
    tensors = file_tensors(read_checkpoint(source), names or DEFAULT_NAMES[target.suffix])
    if target.suffix == ".safetensors":
        write_safetensors(target, tensors, overwrite=overwrite, progress=progress)
    else:
        write_pth(target, tensors, overwrite)
    return len(tensors)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python turbo_core/convert.py",
        description="Converts a TurboDiffusion checkpoint of any known layout into one file.",
    )
    parser.add_argument("source", metavar="IN", type=Path, help="file, shard, index or folder")
    parser.add_argument("target", metavar="OUT", type=Path, help=".safetensors, .pth or .pt")
    parser.add_argument("--names", choices=NAMES, help="default: comfy for .safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace an older OUT")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)
    try:
        count = convert(args.source, args.target, args.names, args.overwrite, _show)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    size = args.target.stat().st_size / 1e9
    sys.stdout.write(f"{args.target}: {count} tensors, {size:.2f} GB\n")


def _stop(number: int, _) -> None:
    sys.stderr.write("error: stopped, nothing was left behind\n")
    sys.exit(128 + number)  # raised wherever the work is, so that it cleans up


def _show(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r{done} of {total} tensors" + "\n" * (done == total))


if __name__ == "__main__":
    main()
