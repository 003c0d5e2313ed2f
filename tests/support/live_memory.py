"""What a forward pass allocates, at its real size and without memory: tensors on "meta".

Triton's launches do nothing there, but what their functions allocate for them is allocated.
"""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While this lasts: `now` and `peak`, bytes of the storages that operations made and that
    somebody still holds."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

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
        self.known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
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
