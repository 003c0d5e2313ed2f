"""What workers do in tests/core/test_workers.py and in tests/host/test_sequence_parallel.py."""

import gc
import importlib
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


def have_no_memory_to_meet() -> None:
    """Before anything else: fail where ranks meet."""

    def meet(ranks):
        raise MemoryError("for NCCL")

    _module("parallel.exchange").meet = meet


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


# Stand for the reductions of turbo_core/host/split_block.py, and reduce over one rank only.
REDUCED = {"summed": lambda ranks, x: x * ranks.count, "largest": lambda ranks, x: x}


def reduce_nothing(ranks, name: str) -> None:
    """From now on do not reduce over ranks what `name` does."""
    setattr(_host("split_block"), name, REDUCED[name])


def reduce_again(ranks, name: str) -> None:
    """End what `reduce_nothing` began."""
    setattr(_host("split_block"), name, getattr(_module("parallel.exchange"), name))


counted = []


def count_models(ranks, more: int) -> None:
    """This process has so many models more than when it was asked first."""
    counted.append(sum(type(x).__name__ == "WanModel" for x in gc.get_objects()))
    assert counted[-1] == counted[0] + more, counted


def run_out_of_memory(ranks) -> None:
    """From now on do so in the second block."""
    split_block = _host("split_block")
    attend = split_block.attend

    def attended(attn, index, *arguments):
        if index == 1:
            raise torch.OutOfMemoryError("in a worker")
        return attend(attn, index, *arguments)

    split_block.attend = attended


def fail_at_the_end(ranks) -> None:
    """Of the next run."""

    def end_run(ranks):
        raise MemoryError("at the end")

    _host("split_worker").end_run = end_run


def have_no_memory_to_decode(ranks) -> None:
    """From now on."""

    def shared_pieces(*_):
        raise torch.OutOfMemoryError("in a worker")

    _host("split_vae").shared_pieces = shared_pieces


def _host(name: str):
    return _module(f"host.{name}")


def _module(name: str):
    return importlib.import_module(f"turbodiffusion_wan.turbo_core.{name}")
