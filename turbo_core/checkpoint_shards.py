"""Checkpoints in several files, as diffusers writes large ones: shards and an index."""

import json
import re
from pathlib import Path

import torch

from .checkpoint_file import CheckpointError, read_tensors

INDEX = ".safetensors.index.json"
SHARD = re.compile(r"(.+)-\d{5}-of-(?!00001)\d{5}\.safetensors")


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
    tensors = {}
    for file in sorted(set(places.values())):
        shard = index.with_name(file)
        if not shard.is_file():
            raise CheckpointError(f"{file} is missing beside {index.name}: download it too")
        try:
            tensors.update(read_tensors(shard))
        except CheckpointError as error:
            raise CheckpointError(f"shard {file}: {error}") from error.__cause__
    for name, file in places.items():
        if name not in tensors:
            raise CheckpointError(
                f"{name} is in {index.name} but not in {file}: download all shards again"
            )
    return tensors


def _read_index(index: Path) -> dict[str, str]:
    """File name by tensor name."""
    if not index.is_file():
        raise CheckpointError(
            f"is one of several shards, and {index.name} is missing beside it: download the whole "
            "folder"
        )
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = all(Path(file).name == file for file in places.values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index.name} is damaged ({type(error).__name__}: {error}). Download it again"
        ) from error
    if not named:
        raise CheckpointError(
            f"{index.name} names files outside its folder: take the model from its official source"
        )
    return places
