"""Copies between a GPU and ordinary memory, while the GPU works on."""

import collections

import torch
from torch import Tensor


class ToMemory:
    """Writes pieces that the GPU makes into memory, each while the GPU makes the next one.

    They pass through pinned memory of a piece's size, which torch keeps for the next time.
    `at_once` pieces are made together, and wait until the GPU has the next ones to make.
    """

    def __init__(self, at_once: int = 1):
        self.at_once, self.waiting = at_once, collections.deque()

    def copy(self, piece: Tensor, destination: Tensor) -> None:
        """piece into destination, complete after `finish` at the latest."""
        if not piece.is_cuda or destination.is_cuda:
            destination.copy_(piece)
            return
        pinned = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True)
        pinned.copy_(piece, non_blocking=True)
        self.waiting.append((_now(piece.device), pinned, destination))
        self._write_all_but(self.at_once)

    def finish(self) -> None:
        """Wait for the GPU, and write what is still on the way."""
        self._write_all_but(0)

    def _write_all_but(self, count: int) -> None:
        while len(self.waiting) > count:
            event, pinned, destination = self.waiting.popleft()
            event.synchronize()
            destination.copy_(pinned)


class FromMemory:
    """Brings pieces to a GPU, at most one of them before the GPU has worked on the one before."""

    def __init__(self, device: torch.device):
        self.device, self.before = device, None

    def copy(self, piece: Tensor) -> Tensor:
        """The piece, contiguous, on the device."""
        if self.device.type != "cuda" or piece.is_cuda:
            return piece.to(self.device).contiguous()
        pinned = torch.empty(piece.shape, dtype=piece.dtype, pin_memory=True).copy_(piece)
        if self.before:
            self.before.synchronize()
        self.before = _now(self.device)
        return pinned.to(self.device, non_blocking=True)


def _now(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
