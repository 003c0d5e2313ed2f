"""Writes checkpoint files: whole or not at all, and never the whole of one in memory."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

Tensors = dict[str, torch.Tensor]

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
}
ALIGNMENT = 64  # bytes that the tensors' start is a multiple of


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
    with _complete_file(path, size, overwrite) as part, part.open("wb") as file:
        file.write(header)
        for done, (name, tensor) in enumerate(values or tensors.items(), start=1):
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
    with _complete_file(path, size, overwrite) as part:
        try:
            torch.save({name: _alone(tensor) for name, tensor in tensors.items()}, part)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error


@contextmanager
def _complete_file(path: Path, size: int, overwrite: bool) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place once the body is through."""
    _check_target(path, size, overwrite)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}): nothing was left behind and an older file is "
            "unchanged. Free some space or choose another place"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _check_target(path: Path, size: int, overwrite: bool) -> None:
    if path.exists() and not (overwrite and path.is_file()):
        raise FileExistsError(f"{path} exists already: choose another name or remove it first")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: create it first, for {path.name}")
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise OSError(
            f"{path} needs {size / 1e9:.2f} GB, but {path.parent} has {free / 1e9:.2f} GB left: "
            "free some space or choose another place"
        )


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
