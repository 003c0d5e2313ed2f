"""Reads a checkpoint file into named tensors that stay on the disk until they are used."""

import pickle
import re
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

ZIP_START = b"PK\x03\x04"
PICKLE_START = b"\x80"
SAFETENSORS_NINTH = b"{"
FOREIGN_STARTS = {
    b"GGUF": "is a GGUF file: load it with a GGUF loader node",
    b"version https://git-lfs": "is a Git LFS pointer, not the checkpoint: run `git lfs pull`",
    b"<": "is a web page, not a checkpoint: use the direct download link",
}

# Keys of a training file's state dict, the surest first.
WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "weights")

# What torch.load raises on bytes that torch.save did not write.
DAMAGE = (
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used: the message says what is wrong, what was found, what to do."""


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a .pth, .pt or .safetensors file, by the names they have in it.

    The first bytes tell the format. Zip-format .pth and .safetensors
    are memory-mapped; PyTorch's pre-1.6 format cannot be, so it is read into memory once. No code
    in a pickle is run. A training file's {"state_dict": ...} and the like are unwrapped.

    Raises:
        CheckpointError: missing, empty, truncated or damaged file, another format, code in it, or
            something else than named tensors; the message starts without the file's name.
    """
    start = _first_bytes(path)
    if start[8:9] == SAFETENSORS_NINTH:  # its first eight bytes are a length, any length
        return _named_tensors(_read_safetensors(path))
    if start.startswith((ZIP_START, PICKLE_START)) and path.name.endswith(".safetensors"):
        # Newer PyTorch goes by this extension, whatever is in the file.
        raise CheckpointError(
            "is a .pth file under a wrong name: rename it from .safetensors to .pth"
        )
    if start.startswith(ZIP_START):
        if not _is_whole_zip(path):
            raise CheckpointError(
                f"is truncated: {path.stat().st_size} bytes without the zip directory that ends a "
                "complete .pth file. Download it again"
            )
        return _named_tensors(_torch_load(path, mmap=True))
    if start.startswith(PICKLE_START):
        return _named_tensors(_torch_load(path, mmap=False))
    raise CheckpointError(_not_a_checkpoint(start))


def _first_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise CheckpointError("does not exist: choose a .pth, .pt or .safetensors file")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError("is empty (0 bytes): download it again")
    return start


def _not_a_checkpoint(start: bytes) -> str:
    for magic, meaning in FOREIGN_STARTS.items():
        if start.startswith(magic):
            return meaning
    return (
        f"is neither a .pth nor a .safetensors file, or is cut short: it starts with {start[:16]!r}"
        ". Download it again, or choose a TurboDiffusion checkpoint"
    )


def _is_whole_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _torch_load(path: Path, mmap: bool) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code is None:
            raise CheckpointError(_damaged(error)) from error
        raise CheckpointError(
            f"contains code or Python objects ({code[1]}), which were not run. Only tensors are "
            "loaded: take the file from its official source, or save its state dict alone"
        ) from error
    except DAMAGE as error:
        raise CheckpointError(_damaged(error)) from error


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(_damaged(error)) from error


def _damaged(error: Exception) -> str:
    reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    first_line = (reason.strip() or type(error).__name__).splitlines()[0]
    return f"is truncated or damaged ({first_line[:200]}). Download it again"


def _named_tensors(data: object) -> dict[str, torch.Tensor]:
    data = _unwrapped(data)
    if not isinstance(data, dict) or not data:
        found = "an empty dict" if data == {} else f"a {type(data).__name__}"
        raise CheckpointError(f"does not hold named tensors, got {found}: save the state dict")
    for name, value in data.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"does not hold named tensors only, got a {type(value).__name__} under {name!r}: "
                "save the model's state dict alone"
            )
    return {name: value.detach() for name, value in data.items()}


def _unwrapped(data: object) -> object:
    """The innermost dict under the keys that training scripts put a state dict under."""
    while isinstance(data, dict):
        inner = next((data[key] for key in WRAPPERS if isinstance(data.get(key), dict)), None)
        if inner is None:
            break
        data = inner
    return data
