"""Writes checkpoint files: whole or not at all, and never the whole of one in memory."""

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from .file import DTYPES as READABLE

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed
    fcntl = None

Tensors = dict[str, torch.Tensor]

DTYPES = {dtype: name for name, dtype in READABLE.items()}
ALIGNMENT = 64  # bytes that the tensors' start is a multiple of

PART = "turbodiffusion-{}.part"  # what a file is called until it is complete
RANDOM = 8  # bytes of chance in such a name, which tell it from a download of the same kind
ABANDONED = 600  # seconds without a write, after which a part that nobody locks is nobody's
FULL = (errno.ENOSPC, errno.EDQUOT)


def write_safetensors(
    path: Path,
    tensors: Tensors,
    values: Iterable[tuple[str, torch.Tensor]] | None = None,
    metadata: dict[str, str] | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a .safetensors file one tensor at a time, each aligned for memory mapping.

    Args:
        path: the file; it appears when it is complete, and until then an older one stays.
        tensors: dtype and shape by name, and the values too unless `values` has them.
        values: (name, tensor) of every one of `tensors` in any order, made when asked for.
        metadata: text for the header.
        overwrite: whether an older file may be replaced.
        progress: called with (done, total) after each tensor.

    Raises:
        FileExistsError: the file exists.
        OSError: it could not be written (disk full, no such folder, not allowed, ...).
        ValueError: a dtype that the format has no name for, or `values` unlike `tensors`.
    """
    header, places = _header(tensors, metadata or {})
    size = len(header) + sum(t.nbytes for t in tensors.values())
    with _complete_file(path, size, overwrite) as file:
        file.write(header)
        for done, (name, tensor) in enumerate(values or tensors.items(), start=1):
            if name not in places:
                raise ValueError(f"{name} was not among the tensors to write, or came twice")
            _check_alike(name, tensor, tensors[name])
            file.seek(len(header) + places.pop(name))
            file.write(_bytes(tensor))
            if progress:
                progress(done, len(tensors))
        if places:
            raise ValueError(f"no values were given for {', '.join(places)}")


def write_pth(path: Path, tensors: Tensors, overwrite: bool = False) -> None:
    """Write a .pth file, PyTorch's zip format, straight from memory-mapped tensors.

    Raises:
        FileExistsError, OSError: as write_safetensors.
    """
    size = sum(t.nbytes for t in tensors.values())
    with _complete_file(path, size, overwrite) as file:
        try:
            torch.save({name: _alone(tensor) for name, tensor in tensors.items()}, file)
        except RuntimeError as error:  # what torch makes of an error of the file's
            cause = error.__context__
            reason = str(error).splitlines()[0]
            raise cause if isinstance(cause, OSError) else OSError(reason) from error


@contextlib.contextmanager
def _complete_file(path: Path, size: int, overwrite: bool) -> Iterator[BinaryIO]:
    """A file in the folder of `path` to write to, which takes its name once the body is through.

    Nobody else writes to it, in whatever process or container: its own name is random and was
    free. Messages name `path` without its folder, as they may reach a client of the server.
    """
    _check_target(path, overwrite)
    _remove_abandoned(path.parent)
    _check_room(path, size)
    part = path.with_name(PART.format(secrets.token_hex(RANDOM)))
    try:
        file = part.open("xb")  # never a file that is there, nor one that a link leads to
        try:
            with file:
                _lock(file)
                yield file
                file.flush()
                os.fsync(file.fileno())
            _take_name(part, path, overwrite)
        finally:
            with contextlib.suppress(OSError):  # what stays is removed by a later save
                part.unlink()
    except FileExistsError as error:
        raise FileExistsError(
            f"{path.name} exists by now, as another program has written it: choose another name"
        ) from error
    except OSError as error:
        advice = "Free some space or choose" if error.errno in FULL else "Choose"
        raise OSError(
            f"{path.name} could not be written ({error.strerror or error}): nothing was left "
            f"behind and an older file is unchanged. {advice} another place"
        ) from error


def _check_target(path: Path, overwrite: bool) -> None:
    if path.exists() and not (overwrite and path.is_file()):
        raise FileExistsError(f"{path.name} exists already: choose another name or remove it first")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path.parent.name} is no folder: create it first, for {path.name}"
        )


def _check_room(path: Path, size: int) -> None:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:  # a drive that does not tell; writing will
        return
    if free < size:
        raise OSError(
            f"{path.name} needs {size / 1e9:.2f} GB, but its drive has {free / 1e9:.2f} GB left: "
            "free some space or choose another place"
        )


def _take_name(part: Path, path: Path, overwrite: bool) -> None:
    """Rename `part` to `path`; without `overwrite` only if nothing has that name, in one step."""
    if overwrite:
        os.replace(part, path)
        return
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: an empty file takes the name first
        path.open("xb").close()
        try:
            os.replace(part, path)
        except OSError:
            path.unlink()
            raise


def _remove_abandoned(folder: Path) -> None:
    """Remove the part files in `folder` whose writers were killed.

    A writer holds a lock on its part, and the lock goes with the process, however it ends. As some
    network drives keep locks to each machine, a part that was written to of late stays as well.
    """
    for part in folder.glob(PART.format(2 * RANDOM * "[0-9a-f]")):
        try:
            status = part.lstat()
            if not stat.S_ISREG(status.st_mode) or time.time() - status.st_mtime < ABANDONED:
                continue
            with part.open("rb+") as file:
                abandoned = _lock(file)
            if abandoned:
                part.unlink()
        except OSError:  # another has removed it, or it is not ours to remove
            continue


def _lock(file: BinaryIO) -> bool:
    """Take the lock of an open file; False if another has it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _header(tensors: Tensors, metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file's start, and where behind it each tensor lies: the widest dtypes first."""
    entries = {"__metadata__": {"format": "pt", **metadata}}
    places, end = {}, 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {tensor.dtype}, which a checkpoint does not hold: save it as one of "
                f"{', '.join(str(dtype) for dtype in DTYPES)}"
            )
        places[name], end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [places[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, places


def _check_alike(name: str, tensor: torch.Tensor, planned: torch.Tensor) -> None:
    if tensor.dtype != planned.dtype or tensor.shape != planned.shape:
        raise ValueError(
            f"{name} became {tensor.dtype} {list(tensor.shape)}, it was {planned.dtype} "
            f"{list(planned.shape)}: remove the patch that changes it"
        )


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's memory, no copy of it if it lies on the CPU without gaps."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a storage of its own, as torch.save writes whole storages; no copy."""
    memory = torch.frombuffer(_bytes(tensor), dtype=tensor.dtype)
    return memory.view(tensor.shape)
