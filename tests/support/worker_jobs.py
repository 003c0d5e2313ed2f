"""What workers do in tests/core/test_workers.py."""

import os
import time

import torch
import torch.distributed as dist


def add_up(ranks, value: int) -> None:
    """Take part in a sum."""
    dist.all_reduce(torch.tensor([value * ranks.rank]), group=ranks.group)


def add_up_one(ranks) -> None:
    """What rank 0 has."""
    dist.all_reduce(torch.zeros(1, dtype=torch.int64), group=ranks.group)


def total_of(given: dict):
    """For rank 0: take part in `add_up_all`, and see that all have the same."""

    def own(ranks):
        total = add_up_all(ranks, given)
        expected = sum_of(given) * ranks.count
        assert total == expected, (total, expected)

    return own


def sum_of(given: dict) -> float:
    """One number for the shapes, dtypes and values in it, in their order."""
    tensors = [given["bf16"], given["turned"], *given["list"]]
    parts = [str((tuple(x.shape), str(x.dtype), x.flatten().tolist())) for x in tensors]
    return sum(ord(c) * (i + 1) for i, c in enumerate("".join(parts) + str(given["a slice"])))


def add_up_all(ranks, given: dict) -> float:
    """The sum of `sum_of` over ranks."""
    total = torch.tensor([sum_of(given)], dtype=torch.float64)
    dist.all_reduce(total, group=ranks.group)
    return float(total)


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
