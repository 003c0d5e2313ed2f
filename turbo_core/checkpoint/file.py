"""Reads a checkpoint file into named tensors that stay on the disk until they are used."""

import json
import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .error import CheckpointError, damaged, shown
from .pth import Locate, list_old, list_zip
from .pth_pickle import ListedTensor, Other

Tensors = dict[str, torch.Tensor]

SUFFIXES = (".safetensors", ".sft", ".pth", ".pt", ".ckpt", ".bin")
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
DEEPEST = 8  # wrappers in wrappers

# The dtypes that files of models hold, by their names in .safetensors.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MOST_TENSORS = 2**14  # of a file
MOST_AXES = 8
LARGEST = 2**62  # of a tensor's numbers, and of its elements with axes of length 0 left out
LONGEST_NAME = 256
MOST_SHARED = 8  # times a file's size that its tensors and their storages may have together


def read_tensors(path: Path) -> Tensors:
    """All tensors of a .pth, .pt or .safetensors file, by the names they have in it.

    The first bytes tell the format. The tensors are memory-mapped, and read into memory only where
    PyTorch's pre-1.6 format has them at odd addresses. Nothing in a pickle is called. A training
    file's {"state_dict": ...} and the like are unwrapped.

    Only dense CPU tensors of the dtypes above are taken. What the file says of them is checked
    before anything is allocated, so that a small file never costs more than a little memory.

    Raises:
        CheckpointError: missing, empty, truncated or damaged file, another format, code in it, or
            something else than named tensors; the message starts without the file's name.
        OSError: the file cannot be read.
    """
    start = _first_bytes(path)
    if start[8:9] == SAFETENSORS_NINTH:  # its first eight bytes are a length, any length
        return _read_safetensors(path)
    content, locate = pth_content(path)
    if locate is None:
        raise CheckpointError(_not_a_checkpoint(path, start))
    return mapped_tensors(path, content, locate)


def pth_content(path: Path) -> tuple[object, Locate | None]:
    """What a .pth or .pt file lists, and where its storages lie; None and None for other files.

    Raises:
        CheckpointError, OSError: as read_tensors.
    """
    start = _first_bytes(path)
    if start[8:9] == SAFETENSORS_NINTH:
        return None, None
    if start.startswith(ZIP_START):
        return list_zip(path)
    return list_old(path) if start.startswith(PICKLE_START) else (None, None)


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a .safetensors file says of it; nothing for any other file or a folder.

    Raises:
        CheckpointError: truncated or damaged file.
        OSError: the file cannot be read.
    """
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        return {}
    if _first_bytes(path)[8:9] != SAFETENSORS_NINTH:
        return {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise damaged(error) from error


def _first_bytes(path: Path) -> bytes:
    if path.suffix.lower() not in SUFFIXES:
        raise CheckpointError(
            "is no checkpoint by its name: choose a .pth, .pt or .safetensors file"
        )
    if not path.is_file():
        raise CheckpointError("does not exist: choose a .pth, .pt or .safetensors file")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise CheckpointError("is empty (0 bytes): download it again")
    return start


def _not_a_checkpoint(path: Path, start: bytes) -> str:
    for magic, meaning in FOREIGN_STARTS.items():
        if start.startswith(magic):
            return meaning
    return (
        f"is neither a .pth nor a .safetensors file, or is cut short ({path.stat().st_size} bytes)"
        ". Download it again, or choose a TurboDiffusion checkpoint"
    )


def _read_safetensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            _check_count(len(names))
            for name in names:
                part = file.get_slice(name)
                dtype = DTYPES.get(part.get_dtype(), part.get_dtype())
                _check_listed(name, dtype, part.get_shape())
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise damaged(error) from error
    for name, offset in _safetensors_offsets(path).items():
        if tensors[name].numel():
            tensors[name].untyped_storage().file_place = path, offset
    return tensors


def _safetensors_offsets(path: Path) -> dict[str, int]:
    """Where in a sound .safetensors file each tensor begins."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + listed["data_offsets"][0] for name, listed in header.items()}


def mapped_tensors(path: Path, content: object, locate: Locate) -> Tensors:
    """The tensors that a .pth file's `content` lists, memory-mapped.

    Their storages say as `file_place` where they are: the path, and the offset in bytes.

    Raises:
        CheckpointError: as read_tensors.
    """
    listed = _named_tensors(content)
    _check_count(len(listed))
    size = path.stat().st_size
    file = _map(path, size)
    tensors, storages, held = {}, {}, 0
    for name, tensor in listed.items():
        place = locate(tensor.storage)
        _check_listed(name, tensor.dtype, tensor.shape)
        _check_extent(name, tensor, len(place))
        held += math.prod(tensor.shape) * tensor.dtype.itemsize
        held += 0 if place in storages else len(place)
        if held > MOST_SHARED * size:
            raise CheckpointError(
                f"has tensors that share memory, {held} bytes in a file of {size}: save the "
                "model's state dict alone"
            )
        if place not in storages:
            storages[place] = _bytes(file, place)
            storages[place].file_place = path, place.start
        tensors[name] = _view(storages[place], tensor)
    return tensors


def _named_tensors(content: object) -> dict[str, ListedTensor]:
    content = _unwrapped(content)
    if not isinstance(content, dict) or not content:
        found = "an empty dict" if isinstance(content, dict) else _kind(content)
        raise CheckpointError(f"does not hold named tensors, got {found}: save the state dict")
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Other):
            raise CheckpointError(
                f"{shown(name)} is {value.what}, a checkpoint holds dense CPU tensors only: save "
                "the model's state dict alone"
            )
        if not isinstance(name, str) or not isinstance(value, ListedTensor):
            raise CheckpointError(
                f"does not hold named tensors only, got {_kind(value)} under "
                f"{shown(ascii(name))}: save the model's state dict alone"
            )
    return content


def _kind(value: object) -> str:
    if isinstance(value, Other):
        return value.what
    return "a Tensor" if isinstance(value, ListedTensor) else f"a {type(value).__name__}"


def _unwrapped(content: object) -> object:
    """The innermost dict under the keys that training scripts put a state dict under."""
    for _ in range(DEEPEST):
        inner = content if isinstance(content, dict) else {}
        inner = next((inner[key] for key in WRAPPERS if isinstance(inner.get(key), dict)), None)
        if inner is None:
            return content
        content = inner
    raise CheckpointError(
        f"has its state dict in more than {DEEPEST} others, or in itself: save the model's state "
        "dict alone"
    )


def _check_count(tensors: int) -> None:
    if tensors > MOST_TENSORS:
        raise CheckpointError(
            f"has {tensors} tensors, more than any model ({MOST_TENSORS}): save the model's state "
            "dict alone"
        )


def _check_listed(name: str, dtype: torch.dtype | str, shape: tuple) -> None:
    """Refuse a name that cannot be one, and what is not a plain tensor of a known dtype."""
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise CheckpointError(
            f"has a tensor with an impossible name of {len(name)} characters ({shown(name, 40)}): "
            "download or convert the file again"
        )
    if dtype not in DTYPES.values():
        raise CheckpointError(
            f"{name} is {str(dtype).removeprefix('torch.')}, a checkpoint holds none: take "
            "TurboDiffusion's plain or -quant file; for one in another format there is ComfyUI's "
            "own Load Diffusion Model"
        )
    if len(shape) > MOST_AXES or not all(map(_is_count, shape)):
        raise damaged(f"{name} has an impossible shape of {len(shape)} axes")
    if math.prod(max(n, 1) for n in shape) > LARGEST:
        raise damaged(f"{name} has the impossible shape {list(shape)}")


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number <= LARGEST  # a bool is none, torch refuses it


def _check_extent(name: str, tensor: ListedTensor, room: int) -> None:
    """Refuse a tensor that reaches beyond its storage of `room` bytes, or is made larger than it
    by strides, as an expanded one is."""
    shape, stride, offset = tensor.shape, tensor.stride, tensor.offset
    if len(stride) != len(shape) or not all(map(_is_count, (offset, *stride))):
        raise damaged(f"{name} has impossible strides or an impossible start")
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    end = last + 1 if count else 0
    if max(end, count) * tensor.dtype.itemsize > room:
        raise CheckpointError(
            f"{name} {list(shape)} is larger than the {room} bytes that the file has for it: save "
            "it whole (tensor.contiguous()), or download the file again"
        )


def _map(path: Path, size: int) -> torch.UntypedStorage:
    try:
        return torch.UntypedStorage.from_file(str(path), False, size)
    except RuntimeError as error:
        raise CheckpointError(
            f"could not be mapped into memory ({size} bytes): copy it to a local drive"
        ) from error


def _bytes(file: torch.UntypedStorage, place: range) -> torch.UntypedStorage:
    """These bytes of the mapped file; a copy where they are not aligned for every dtype."""
    part = file[place.start : place.stop]
    return part.clone() if place.start % 8 else part


def _view(storage: torch.UntypedStorage, tensor: ListedTensor) -> torch.Tensor:
    if 0 in tensor.shape:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(storage, tensor.offset, tensor.shape, tensor.stride)
