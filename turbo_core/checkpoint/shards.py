"""Checkpoints in several files, as diffusers writes large ones: shards and an index."""

import json
import re
from pathlib import Path

import torch

from .error import CheckpointError, shown
from .file import read_tensors

INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(.+)-\d{5}-of-(?!00001)\d{5}\.safetensors")
LARGEST_INDEX = 2**22  # bytes; that of a 14B model has 1e5


def read_files(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint at `path`, each memory-mapped from the file that holds it.

    `path` is one file, or of a set of shards any one of them, the index (*.safetensors.index.json)
    or the folder.

    Raises:
        CheckpointError: not readable, see read_tensors; a shard or the index is missing, or they do
            not belong together.
    """
    if path.is_dir():
        path = _in_folder(path)
    if match := SHARD.fullmatch(path.name):
        path = path.with_name(f"{match[1]}{INDEX}")
    return _read_shards(path) if path.name.endswith(INDEX) else read_tensors(path)


def _in_folder(folder: Path) -> Path:
    files = sorted(folder.glob(f"*{INDEX}"))
    files = files or sorted(f for f in folder.glob("*.safetensors") if f.is_file())
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:3]) or "none"
        raise CheckpointError(
            f"is a folder without one index (*{INDEX}) or one .safetensors file, got {found}: "
            "choose a .pth, .pt or .safetensors file, or a diffusers model's transformer folder"
        )
    return files[0]


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    places = _read_index(index)
    there = {file.name for file in index.parent.iterdir()}
    tensors = {}
    for file in sorted(set(places.values())):
        if file not in there:  # a name from the index becomes no path before it is known
            raise CheckpointError(
                f"{shown(file, 80) or 'a file without a name'} is missing beside {index.name}: "
                "download it too"
            )
        try:
            tensors.update(read_tensors(index.with_name(file)))
        except CheckpointError as error:
            raise CheckpointError(f"shard {file}: {error}") from error.__cause__
    for name, file in places.items():
        if name not in tensors:
            raise CheckpointError(
                f"{shown(name)} is in {index.name} but not in {file}: download all shards again"
            )
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """File name by tensor name."""
    if not index.is_file():
        raise CheckpointError(
            f"is one of several shards, and {index.name} is missing beside it: download the whole "
            "folder"
        )
    if index.stat().st_size > LARGEST_INDEX:
        raise CheckpointError(
            f"{index.name} has {index.stat().st_size} bytes, more than any model needs: download "
            "it again"
        )
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged_index(index, f"{type(error).__name__}: {error}") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise _damaged_index(index, "it has no weight_map of file names")
    if any("/" in file or "\\" in file for file in places.values()):
        raise CheckpointError(
            f"{index.name} names files outside its folder: take the model from its official source"
        )
    return places


def _damaged_index(index: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{index.name} is damaged ({shown(reason)}). Download it again")
