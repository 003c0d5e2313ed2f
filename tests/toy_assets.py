"""Packs a trained toy for the repository: INT8 checkpoints and the VAE in one small archive.

    python tests/toy_assets.py ARCHIVE --t2v RUN [--i2v RUN_HIGH RUN_LOW] [--comfyui FOLDER]

Each RUN is the folder of a finished toy run, whose merged model is taken; the VAE is that of the
first. It tells what each part takes, and writes nothing where all of them take more than they may.
"""

import argparse
import io
import lzma
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "support"))

import comfyui_install
import pack  # noqa: F401

MOST_BYTES = 8_000_000
# Most of what is not INT8 has two bytes a number, so the place in the pair tells the coder much.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 1, "pb": 1}]
MERGED, VAE = Path("merge", "model.safetensors"), Path("data", "vae.safetensors")


def main() -> None:
    args = arguments()
    import_comfyui(args.comfyui)
    with tempfile.TemporaryDirectory() as folder:
        write_parts(args.t2v, args.i2v, Path(folder))
        files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
    for name, content in files.items():
        tell(f"{name}: {len(content):,} bytes, {len(compressed({name: content})):,} packed")
    archive = compressed(files)
    if len(archive) > MOST_BYTES:
        sys.exit(f"error: {len(archive):,} bytes together, at most {MOST_BYTES:,}: train smaller")
    args.archive.write_bytes(archive)
    tell(f"{args.archive}: {len(archive):,} bytes")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="the .tar.xz to write")
    parser.add_argument("--t2v", type=Path, required=True, metavar="RUN")
    parser.add_argument("--i2v", type=Path, nargs=2, metavar=("RUN_HIGH", "RUN_LOW"))
    parser.add_argument("--comfyui", type=Path, help="default: the one that tests run in")
    return parser.parse_args()


def import_comfyui(folder: Path | None) -> None:
    """Make ComfyUI's modules importable, without its server."""
    folder = folder or comfyui_install.find()
    if folder is None:
        sys.exit("error: no ComfyUI found: name its folder by --comfyui")
    sys.path.insert(0, str(folder))
    from turbodiffusion_pack.turbo_core.host import standalone  # noqa: F401


def write_parts(t2v: Path, i2v: list[Path] | None, folder: Path) -> None:
    """The files of the archive into `folder`."""
    shutil.copyfile(t2v / VAE, folder / "toy_vae.safetensors")
    write_int8(t2v / MERGED, folder / "toy_t2v.safetensors")
    for name, run in zip(("high", "low"), i2v or [], strict=False):
        write_int8(run / MERGED, folder / f"toy_i2v_{name}.safetensors")


def write_int8(source: Path, target: Path) -> None:
    """What TurboLoader, W8A8Quantize and TurboSaveCheckpoint make of a merged model."""
    from turbodiffusion_pack.turbo_core.host.as_nodes import quantized
    from turbodiffusion_pack.turbo_core.host.save import save_turbo_model

    save_turbo_model(quantized([source]), target)


def compressed(files: dict[str, bytes]) -> bytes:
    """A .tar.xz of the files, the same bytes for the same files."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return lzma.compress(tar.getvalue(), filters=FILTERS)


def tell(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
