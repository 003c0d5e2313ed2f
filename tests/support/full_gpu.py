"""A GPU that has no room for some operations until torch's cache on it is given back."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FullGPU(TorchDispatchMode):
    """While this lasts, for operations of functions that `during` gave.

    asked: how many there were that make tensors, those that were refused included.
    """

    EVERY = 7  # one of so many finds no room, nor does any then

    def __init__(self):
        super().__init__()
        self.asked, self.counts, self.full = 0, False, False

    def during(self, function: Callable) -> Callable:
        """The same function, in which operations find no room."""

        def run(*args, **kwargs):
            self.counts = True
            try:
                return function(*args, **kwargs)
            finally:
                self.counts = False

        return run

    def give_back(self) -> None:
        """Then there is room again."""
        self.full = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.counts and not func._schema.is_mutable:
            self.asked += 1
            self.full |= self.asked % self.EVERY == 0
            if self.full:
                raise torch.OutOfMemoryError("no room")
        return func(*args, **(kwargs or {}))
