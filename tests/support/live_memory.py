"""What a forward pass allocates, at its real size and without memory: tensors on "meta".

Triton's launches do nothing there, but what their functions allocate for them is allocated, by the
rules of torch's caching allocator (c10/cuda/CUDACachingAllocator.cpp) for one stream.
"""

import contextlib
import types
import weakref
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MB = 2**20


class Piece:
    """A part of a segment, which is what the allocator gets from the GPU at a time."""

    def __init__(self, size: int, before: "Piece | None", after: "Piece | None"):
        self.size, self.before, self.after = size, before, after
        for other, side in ((before, "after"), (after, "before")):
            if other is not None:
                setattr(other, side, self)


class Allocator:
    """torch's on a GPU of `room` bytes: of equally large pieces the one that was freed first.

    `reserved` are bytes that it has of the GPU. Where those end, it gives segments back that are
    free as a whole, unless it is not to do so `itself`, and then raises torch.OutOfMemoryError.
    """

    def __init__(self, room: int, itself: bool = True):
        self.room, self.reserved, self.itself = room, 0, itself
        self.free = {True: [], False: []}  # pieces, by whether they are small

    def take(self, size: int) -> Piece:
        size = max(-(-size // 512) * 512, 512)
        small = size <= MB
        fitting = [piece for piece in self.free[small] if piece.size >= size]
        piece = min(fitting, key=lambda piece: piece.size) if fitting else self._segment(size)
        if fitting:
            self.free[small].remove(piece)
        rest = piece.size - size
        if rest >= (512 if small else MB + 512):
            piece.size = size
            self.free[small].append(Piece(rest, piece, piece.after))
        piece.small = small
        return piece

    def give(self, piece: Piece) -> None:
        free = self.free[piece.small]
        for other in (piece.before, piece.after):
            if other is not None and other in free:
                free.remove(other)
                piece.size += other.size
                if other is piece.before:
                    piece.before = other.before
                else:
                    piece.after = other.after
        for other, side in ((piece.before, "after"), (piece.after, "before")):
            if other is not None:
                setattr(other, side, piece)
        free.append(piece)

    def give_back(self) -> None:
        """The GPU gets the segments that are free as a whole."""
        for free in self.free.values():
            whole = [piece for piece in free if piece.before is None and piece.after is None]
            free[:] = [piece for piece in free if piece not in whole]
            self.reserved -= sum(piece.size for piece in whole)

    def _segment(self, size: int) -> Piece:
        if size < 10 * MB:
            size = 2 * MB if size <= MB else 20 * MB
        size = -(-size // (2 * MB)) * 2 * MB
        if self.reserved + size > self.room and self.itself:
            self.give_back()
        if self.reserved + size > self.room:
            raise torch.OutOfMemoryError(f"{size} bytes more than {self.reserved} of {self.room}")
        self.reserved += size
        return Piece(size, None, None)


class LiveBytes(TorchDispatchMode):
    """While this lasts: `now` and `peak`, bytes of the storages that operations made and that
    somebody still holds; an `allocator` is asked for each."""

    def __init__(self, allocator: Allocator | None = None):
        super().__init__()
        self.now = self.peak = 0
        self.known = {}
        self.allocator = allocator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self.known:
            return
        size = storage.nbytes()
        self.known[storage._cdata] = self.allocator and self.allocator.take(size)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, key: int, size: int) -> None:
        if (piece := self.known.pop(key)) is not None:
            self.allocator.give(piece)
        self.now -= size


@contextlib.contextmanager
def kernels_that_allocate_only(monkeypatch) -> Iterator[None]:
    """Triton's functions run on "meta" tensors, their kernels do not."""
    from triton.runtime.jit import KernelInterface
    from turbodiffusion_pack.kernels import dispatch

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "triton_unavailable", lambda device: None)
        patch.setattr(dispatch, "interpreting", lambda: False)
        patch.setattr(KernelInterface, "__getitem__", lambda *_: lambda *_, **__: None)
        yield


def play_cuda_that_allocates_only(monkeypatch, card: tuple[int, int]) -> None:
    """As on `card`, whose kernels in CUDA C++ are neither compiled nor run."""
    import older_cards
    from turbodiffusion_pack.kernels import nvrtc

    older_cards.pretend(monkeypatch, card)
    loaded = types.SimpleNamespace(launch=lambda *_: None)
    for name, stub in {
        "unavailable": lambda: None,
        "version": lambda: (99, 0),
        "load": lambda *_, **__: loaded,
        "target_of": lambda *_: "",
        "address": lambda x: 0,
        "tensor_map": lambda *_: nvrtc.TENSOR_MAP(),
    }.items():
        monkeypatch.setattr(nvrtc, name, stub)
