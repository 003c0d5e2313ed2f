"""What workers do in tests/core/test_workers.py."""

import os
import time

import torch
import torch.distributed as dist


def add_up(ranks, value: int) -> None:
    """Take part in a sum."""
    dist.all_reduce(torch.tensor([value * ranks.rank]), group=ranks.group)


def meet_in_another_group(ranks) -> None:
    """Make a group, through the store."""
    dist.barrier(dist.new_group(range(ranks.count)))


def fail(ranks) -> None:
    """As a rank that is out of memory, while the others wait for it."""
    if ranks.rank == 1:
        raise MemoryError("rank 1 is out of memory")
    dist.barrier(ranks.group)


def wait(ranks) -> None:
    """Not answer."""
    time.sleep(600)


def end(ranks) -> None:
    """As a worker that somebody kills."""
    if ranks.rank == 1:
        os._exit(9)
    dist.barrier(ranks.group)
