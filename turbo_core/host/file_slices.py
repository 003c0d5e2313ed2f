"""Weights that ComfyUI reads from their file, rather than through its mapping into memory.

With dynamic VRAM it copies them into pinned memory, which it streams from. Through the mapping they
would be held in RAM a second time.
"""

import threading
from collections.abc import Iterable

import torch

from .versions import file_slice


def read_from_files(tensors: Iterable[torch.Tensor]) -> None:
    """Tell the host where in a file those `tensors` lie that are views of one."""
    files = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        place = getattr(storage, "file_place", None)
        if place is None or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            continue
        path, offset = place
        if path not in files:
            files[path] = path.open("rb", buffering=0), threading.Lock()
        storage._comfy_tensor_file_slice = file_slice(*files[path], offset, tensor.nbytes)
