"""The trained toy: its four files in tests/data/toy, and the command that makes them of a training.

    python tests/support/toy_assets.py --vae VAE --t2v MERGED --high MERGED --low MERGED

MERGED is RUN/merge/model.safetensors of turbo_core/train.py, VAE is RUN/data/vae.safetensors. The
models become INT8 as W8A8Quantize makes them, and files as TurboSaveCheckpoint writes them.
"""

import argparse
import lzma
import shutil
import sys
import tempfile
from pathlib import Path

import comfyui_install
import pack  # noqa: F401
from comfyui_install import ROOT

FOLDER = ROOT / "tests" / "data" / "toy"
MOST = 8_000_000  # bytes of all together
# Where each lies in ComfyUI's models folder.
PLACES = {
    "vae": Path("vae", "toy_vae.safetensors"),
    "t2v": Path("diffusion_models", "toy_t2v.safetensors"),
    "high": Path("diffusion_models", "toy_i2v_high.safetensors"),
    "low": Path("diffusion_models", "toy_i2v_low.safetensors"),
}
# What each workflow of the demo needs: its checkpoints in order.
CHECKPOINTS = {"t2v": ("t2v",), "i2v": ("high", "low")}
# These files were trained with; the nodes' own is 0.1, the preset toy's by now 0.2.
TOPK = {"t2v": 0.3, "i2v": 0.2}
# LZMA's bits for numbers of two bytes: a bf16 tensor packs to 0.67 of its size, else to 0.72.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 2, "lp": 1, "pb": 2}]


def packed(name: str) -> Path:
    """The file in the repository that holds the model `name` of PLACES."""
    return FOLDER / f"{PLACES[name].name}.xz"


def unpack(workflow: str, models: Path) -> None:
    """Write the files of `workflow`, t2v or i2v, into ComfyUI's folder `models`."""
    for name in ("vae", *CHECKPOINTS[workflow]):
        path = models / PLACES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.decompress(packed(name).read_bytes()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in PLACES:
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    given = {name: path for name, path in vars(parser.parse_args()).items() if path}
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, path in given.items():
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder, PLACES[name].name)
            (shutil.copyfile if name == "vae" else quantize)(path, made)
            packed(name).write_bytes(lzma.compress(made.read_bytes(), filters=FILTERS))
        say(f"{packed(name)}: {packed(name).stat().st_size / 1e6:.2f} MB")
    total = sum(path.stat().st_size for path in FOLDER.glob("*.xz"))
    say(f"together {total / 1e6:.2f} MB of {MOST / 1e6:.0f} allowed")
    if total > MOST:
        raise SystemExit("too much for the repository: train smaller networks")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def quantize(source: Path, target: Path) -> None:
    """The merged model in INT8, by the nodes' own code inside ComfyUI; the rest in bf16."""
    start_comfyui()
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file
    from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
    from turbodiffusion_pack.turbo_core.host.quantize_model import quantize_model
    from turbodiffusion_pack.turbo_core.host.save import save_turbo_model

    half = target.with_stem(f"{target.stem}_bf16")
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    save_file({n: t.to(torch.bfloat16) for n, t in load_file(source).items()}, half, metadata)
    save_turbo_model(quantize_model(load_turbo_model(str(half)))[0], target)


def start_comfyui() -> None:
    """ComfyUI inside this process, on the CPU: the files come out the same everywhere."""
    comfyui = comfyui_install.find()
    if comfyui is None:
        raise SystemExit("no ComfyUI found: run `make demo`, or set COMFYUI_DIR")
    if "comfy" in sys.modules:
        return
    sys.path.insert(0, str(comfyui))
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()


if __name__ == "__main__":
    main()
