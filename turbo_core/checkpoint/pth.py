"""Reads what is in PyTorch's .pth files, the zip format and the one before 1.6, unallocated."""

import io
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path

from .error import CheckpointError, damaged, shown
from .pth_pickle import Storage, Unpickler
from .pth_zip import stored_records

# What the old format's first two pickles say.
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001

LONGEST_PICKLE = 2**24  # bytes; a training file of a 14B model has 2e6

# The bytes of a storage in the file.
Locate = Callable[[Storage], range]


def list_zip(path: Path) -> tuple[object, Locate]:
    """What the zip-format .pth file at `path` holds, and where its storages lie.

    Raises:
        CheckpointError: see stored_records and Unpickler.load.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        records = stored_records(data)
        pickles = [name for name in records if re.fullmatch("[^/]+/data[.]pkl", name)]
        if len(pickles) != 1:
            raise damaged(f"{len(pickles)} records data.pkl in the zip archive")
        root = pickles[0].removesuffix("data.pkl")
        order = records.get(f"{root}byteorder", range(0))
        if data[order.start : order.stop] not in (b"", b"little"):
            raise _big_endian()
        listed = records[pickles[0]]
        if len(listed) > LONGEST_PICKLE:
            raise damaged(f"{len(listed)} bytes of data.pkl, more than any model needs")
        content = Unpickler(io.BytesIO(data[listed.start : listed.stop])).load()

    def locate(storage: Storage) -> range:
        name = f"{root}data/{storage.key}"
        if name not in records:
            raise damaged(f"record {shown(name, 60)} is missing")
        return _part(records[name], storage)

    return content, locate


def list_old(path: Path) -> tuple[object, Locate]:
    """What the .pth file of PyTorch before 1.6 at `path` holds, and where its storages lie.

    Five pickles (a magic number, the version, the machine, the content, the storages' keys), then
    for each key the number of elements in 8 bytes and the elements.

    Raises:
        CheckpointError: damaged, or not written by torch.save.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = io.BytesIO(file.read(LONGEST_PICKLE))
        pickles = Unpickler(head)
        if pickles.load() != MAGIC or pickles.load() != PROTOCOL:
            raise CheckpointError(
                "is a pickle, but not one of torch.save: save the state dict with torch.save"
            )
        match pickles.load():
            case {"little_endian": False}:
                raise _big_endian()
        content, keys = pickles.load(), pickles.load()
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise damaged("no list of storages")
        file.seek(head.tell())
        places = {key: _next_storage(file, key, pickles.storages) for key in keys}

    def locate(storage: Storage) -> range:
        if storage.key not in places:
            raise damaged(f"storage key {shown(storage.key, 40)} is missing")
        return _part(places[storage.key], storage)

    return content, locate


def _next_storage(file: io.BufferedReader, key: str, storages: dict[str, Storage]) -> range:
    """The elements of the storage that `file` is at, which it is then behind."""
    if key not in storages:
        raise damaged(f"storage key {shown(key, 40)} is in no tensor")
    storage, count = storages[key], file.read(8)
    if len(count) < 8 or struct.unpack("<q", count)[0] != storage.numel or storage.numel < 0:
        raise damaged(f"storage key {shown(key, 40)} has another length")
    start = file.tell()
    end = start + storage.numel * storage.dtype.itemsize
    if end > file.seek(0, io.SEEK_END):
        raise damaged(f"the file ends inside of storage {shown(key, 40)}")
    file.seek(end)
    return range(start, end)


def _part(record: range, storage: Storage) -> range:
    """The bytes of `storage`, which may be a view, in those that the file has under its key."""
    size = storage.dtype.itemsize
    start = record.start + storage.start * size
    end = start + storage.numel * size
    if not record.start <= start <= end <= record.stop:
        raise damaged(
            f"{storage.numel} elements in {len(record)} bytes of storage {shown(storage.key, 40)}"
        )
    return range(start, end)


def _big_endian() -> CheckpointError:
    return CheckpointError(
        "was saved on a big-endian machine: save its state dict as .safetensors there"
    )
