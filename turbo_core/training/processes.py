"""One process, or several under torchrun: who speaks, and what all of them agree on."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from .error import TrainingError

T = TypeVar("T")


@contextlib.contextmanager
def processes(device: str) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; the device of this one.

    Args:
        device: "cuda" (each process takes the GPU of its local rank), "cuda:1", "cpu".

    Raises:
        TrainingError: a GPU is asked for that is not there.
    """
    together = dist.is_available() and dist.is_torchelastic_launched()
    if together:  # objects travel over gloo, tensors on a GPU over nccl
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield _usable(_own(torch.device(device), together))
    finally:
        if together:
            gc.collect()  # sharded networks hold the group, in circles: a thread of it outlived it
            dist.destroy_process_group()


def _own(device: torch.device, together: bool) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", dist.get_node_local_rank() if together else 0)
    return device


def _usable(device: torch.device) -> torch.device:
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if device.index >= found:
            raise TrainingError(
                f"GPU {device.index} is asked for, this machine has {found} that torch can use: "
                "choose another --device, or start fewer processes"
            )
        torch.cuda.set_device(device)
    return device


def grouped() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, 0 where it is alone."""
    return dist.get_rank() if grouped() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if grouped() else 1


def say(text: str) -> None:
    """One line to the terminal (stderr), from the first process only."""
    if rank() == 0:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def agreed(work: Callable[[], T]) -> T:
    """work() done by the first process; all get its result, which is picklable, or its error.

    Raises:
        TrainingError: with the message of the OSError, ValueError or TrainingError that work
            raised, in every process alike.
    """
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome[0] = work()
        except (OSError, ValueError, TrainingError) as error:
            outcome[1] = str(error)
    if grouped():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise TrainingError(outcome[1], everywhere=True)
    return outcome[0]


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The mean of a small tensor over all processes, on the CPU; not finite where one is not."""
    values = values.cpu()
    if grouped():
        dist.all_reduce(values)
        values /= count()
    return values
