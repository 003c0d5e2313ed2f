"""Step checkpoints: the training state of one step, by torch.distributed.checkpoint.

    checkpoints/step-00001500/{.metadata, __0_0.distcp, ...}      complete, as it has this name
    checkpoints/step-00002000.part/                               being written, or left by a kill

A checkpoint is written beside the others, synced, and takes its name in one rename. The last two
are kept.
"""

import io
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.stateful import Stateful

from .error import TrainingError
from .processes import agreed, grouped, say

NAME = re.compile(r"step-(\d{8})")
PART = ".part"
DAMAGED = ".damaged"
KEPT = 2
PLAIN = (bool, int, float, str, list, tuple, type(None))  # what optimizers have beside tensors

# All that a checkpoint's description is made of. Reading it calls nothing else.
METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


def save(folder: Path, step: int, state: dict) -> None:
    """Write the checkpoint of `step` into `folder`, and remove all but the last two.

    Args:
        state: tensors, dicts of them, or what has state_dict and load_state_dict (see Trained).

    Raises:
        TypeError: something else is in it, which would be pickled.
        TrainingError: it could not be written (disk full, ...); the older ones are whole.
    """
    state = {n: v.state_dict() if isinstance(v, Stateful) else v for n, v in state.items()}
    _check_plain(state)
    target = folder / f"step-{step:08}"
    part = target.with_suffix(PART)
    agreed(lambda: _make_room(part))
    try:
        with warnings.catch_warnings():  # that one process is alone is no news
            warnings.simplefilter("ignore")
            dcp.save(state, storage_writer=dcp.FileSystemWriter(part), no_dist=not grouped())
    except (CheckpointException, OSError) as error:
        agreed(lambda: shutil.rmtree(part, ignore_errors=True))
        raise TrainingError(_not_written(folder, step, error), everywhere=True) from error
    agreed(lambda: _take_name(part, target))


def load(folder: Path, state: dict) -> int:
    """Read the newest checkpoint in `folder` into `state`, in place.

    Returns:
        Its step, 0 if there is none yet.

    Raises:
        TrainingError: it is of another network, or none of them can be read.
    """
    reasons = []
    for step in reversed(agreed(lambda: steps_in(folder))):
        path = folder / f"step-{step:08}"
        try:
            _read(path, state)
            return step
        except CheckpointException as error:
            cause = _cause(error)
            if isinstance(cause, ValueError):
                raise TrainingError(
                    f"{path} is of another network or optimizer ({_line(cause)}): use the settings "
                    "that it was made with, or another --out",
                    everywhere=True,
                ) from error
            reasons.append(f"{path.name}: {_line(cause)}")
            say(f"{path} is damaged ({_line(cause)}): going on from the one before")
            agreed(lambda damaged=path: _set_aside(damaged))
    if reasons:
        raise TrainingError(
            f"no checkpoint in {folder} can be read ({'; '.join(reasons)}): copy them back from "
            "where they are whole, or remove the stage's folder and start again",
            everywhere=True,
        )
    return 0


def steps_in(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, in order."""
    names = (NAME.fullmatch(path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def remove_parts(folder: Path) -> None:
    """Remove what a killed run left unfinished."""
    for part in folder.glob("*" + PART):
        shutil.rmtree(part)


def _check_plain(state: dict, path: str = "") -> None:
    for name, value in state.items():
        if isinstance(value, dict):
            _check_plain(value, f"{path}{name}.")
        elif not isinstance(value, (torch.Tensor, *PLAIN)):
            raise TypeError(f"{path}{name} is a {type(value).__name__}, which no checkpoint holds")


def _make_room(part: Path) -> None:
    part.parent.mkdir(exist_ok=True)
    if part.exists():
        shutil.rmtree(part)


def _take_name(part: Path, target: Path) -> None:
    part.rename(target)
    sync(target.parent)
    for step in steps_in(target.parent)[:-KEPT]:
        old = target.parent / f"step-{step:08}"
        gone = old.with_suffix(PART)  # half removed, it must not look complete
        old.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _set_aside(path: Path) -> None:
    aside = path.with_suffix(DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)


def sync(folder: Path) -> None:
    """Have the names in a folder on the disk, where a folder can be opened for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read(path: Path, state: dict) -> None:
    reader = _Reader(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.load(state, storage_reader=reader, planner=_Planner(), no_dist=not grouped())
        except CheckpointException as error:
            raise error from reader.problem  # torch 2.11 keeps that to itself


class _Reader(dcp.FileSystemReader):
    """Reads the description of a checkpoint without calling what a file names.

    Attributes:
        problem: why it could not be read.
    """

    problem: Exception | None = None

    def read_metadata(self) -> dcp.Metadata:
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = _Unpickler(file).load()
        except Exception as error:  # whatever a damaged pickle makes of itself
            self.problem = error
            raise
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"its description names {module}.{name}")
        return super().find_class(module, name)


class _Planner(DefaultLoadPlanner):
    """Wants the same names on both sides, and takes numbers and texts only beside tensors."""

    def create_local_plan(self) -> dcp.LoadPlan:
        wrong = self.state_dict.keys() ^ self.metadata.state_dict_metadata.keys()
        if wrong:
            raise ValueError(f"only one of both has {min(wrong)}, {len(wrong)} such names in all")
        return super().create_local_plan()

    def load_bytes(self, read_item: dcp.planner.ReadItem, value: io.BytesIO) -> None:
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


def _not_written(folder: Path, step: int, error: BaseException) -> str:
    older = steps_in(folder)
    keeps = f"the one of step {older[-1]} is whole" if older else "there is no older one"
    return (
        f"the checkpoint of step {step} could not be written ({_line(_cause(error))}), {keeps}: "
        f"free some space in {folder} and start the same command again"
    )


def _cause(error: BaseException) -> BaseException:
    """What went wrong, beneath what torch makes of it."""
    if isinstance(error, CheckpointException):
        error = error.__cause__ or next(iter(error.failures.values()))[0]
    while not isinstance(error, OSError) and isinstance(error.__context__, OSError):
        error = error.__context__
    return error


def _line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0].rstrip(".")
