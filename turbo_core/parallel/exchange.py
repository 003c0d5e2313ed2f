"""What ranks tell each other, over torch.distributed: NCCL between GPUs, gloo between CPUs."""

from __future__ import annotations  # a torch without torch.distributed has none of its types

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

# What torch and NCCL are told while ranks meet, which is when they ask.
SETTINGS = {
    # As torch wants it of those who end exchanges themselves, see give_up. Else it ends the
    # process, ComfyUI's, where one fails, and where its own watch over them does not wake for long.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # All ranks are on this computer: nobody else can reach them, and no firewall or VPN is between.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


A_MOMENT = 1  # second, in which the start of an exchange is over unless the GPU is in its way


class Way:
    """The way to the other ranks, until it is closed.

    An exchange that NCCL gives up between its start and its end counts for good as begun, and all
    later ones in this thread wait for its end. So nothing starts on a closed way, and none is
    closed while something starts.
    """

    def __init__(self):
        self.lock, self.closed = threading.Lock(), False

    def start(self, exchange: Callable, *arguments, **options):
        """What exchange(...) gives.

        Raises:
            RuntimeError: the way is closed.
        """
        with self.lock:
            if self.closed:
                raise RuntimeError("the other ranks are gone")
            return exchange(*arguments, **options)

    def close(self) -> None:
        """From any thread."""
        found = self.lock.acquire(timeout=A_MOMENT)
        self.closed = True
        if found:
            self.lock.release()


class Ranks(NamedTuple):
    """The processes that work on one video, as one of them sees them."""

    group: dist.ProcessGroup | None  # None where this one is alone
    rank: int = 0
    count: int = 1
    way: Way | None = None


def join(backend: str, store: str, rank: int, count: int, seconds: float) -> Ranks:
    """Join the others of a group, who meet in the file `store`; as torch's default group.

    Args:
        backend: "gloo", or "cpu:gloo,cuda:nccl".
        seconds: after which an exchange gives up.
    """
    with _settings():
        dist.init_process_group(
            backend, store=dist.FileStore(store, count), rank=rank, world_size=count,
            timeout=timedelta(seconds=seconds),
        )  # fmt: skip
    return Ranks(dist.group.WORLD, rank, count, Way())


def meet(ranks: Ranks) -> None:
    """Connect the ranks' GPUs, which takes memory and seconds.

    NCCL would do so at the first exchange, and there wait for good for a rank that does not come.
    So first each needs a GPU that works, and hears of the others over gloo.
    """
    on_gpus = _on_gpus(ranks)
    x = torch.zeros(1, ranks.count, device="cuda" if on_gpus else "cpu")
    summed(ranks, torch.zeros(1))
    if not on_gpus:
        return
    with _settings():
        summed(ranks, x)
        rows = [slice(r, r + 1) for r in range(ranks.count)]
        gather(ranks, [x[:, rows[ranks.rank]].contiguous()], [rows])  # two by two, as in a pass
        torch.cuda.synchronize()


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """While this lasts the environment has SETTINGS."""
    before = {name: os.environ.get(name) for name in SETTINGS}
    os.environ.update(SETTINGS)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _on_gpus(ranks: Ranks) -> bool:
    return torch.cuda.is_available() and "nccl" in dist.get_backend_config(ranks.group)


def give_up(ranks: Ranks) -> None:
    """End this process's exchanges with ranks that are gone, from any thread.

    Those over gloo end by themselves; the GPU would wait for the others for good.
    """
    ranks.way.close()
    if _on_gpus(ranks):
        ranks.group._get_backend(torch.device("cuda")).abort()


def leave(ranks: Ranks) -> None:
    """Be in no group any more."""
    dist.destroy_process_group()


class Blank(NamedTuple):
    """A tensor that is still to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    on_gpu: bool


def give(ranks: Ranks, tensors: list[torch.Tensor]) -> None:
    """Rank 0's tensors to all others, which `take` them."""
    for x in tensors:
        if x.numel():
            flat = x.contiguous().view(-1).view(torch.uint8)
            _done(ranks, dist.broadcast, flat, dist.get_global_rank(ranks.group, 0))


def take(ranks: Ranks, blanks: list[Blank]) -> list[torch.Tensor]:
    """The tensors that rank 0 gives, on the CPU or this rank's GPU."""
    found = []
    for blank in blanks:
        device = "cuda" if blank.on_gpu else "cpu"
        found.append(torch.empty(blank.shape, dtype=blank.dtype, device=device))
    give(ranks, found)
    return found


def gather(ranks: Ranks, own: list[torch.Tensor], shares: list[list[slice]]) -> list[torch.Tensor]:
    """Every rank's share of some tensors, put together on every rank, in one exchange.

    Args:
        own: this rank's shares, each [B, l, ...] and contiguous.
        shares: for each tensor the rows of every rank.

    Returns:
        [B, L, ...] each.
    """
    outgoing, incoming, whole = [], [], []
    for x, rows in zip(own, shares, strict=True):
        full = x.new_empty(x.shape[0], rows[-1].stop, *x.shape[2:])
        full[:, rows[ranks.rank]] = x
        outgoing += [[sample] * ranks.count for sample in x]
        incoming += [[sample[r] for r in rows] for sample in full]
        whole.append(full)
    swap(ranks, outgoing, incoming)
    return whole


def columns_to_rows(
    ranks: Ranks, own: list[torch.Tensor], shares: list[list[slice]]
) -> list[torch.Tensor]:
    """From all rows of some columns to some rows of all columns, in one exchange.

    Args:
        own: this rank's columns, each [B, L, c] and contiguous, as many on every rank.
        shares: for each tensor the rows of every rank.

    Returns:
        [B, l, ranks * c] each.
    """
    outgoing, incoming, parts = [], [], []
    for x, rows in zip(own, shares, strict=True):
        mine = x[:, rows[ranks.rank]]
        found = [mine if r == ranks.rank else torch.empty_like(mine) for r in range(ranks.count)]
        outgoing += [[sample[r] for r in rows] for sample in x]
        incoming += [[part[b] for part in found] for b in range(len(x))]
        parts.append(found)
    swap(ranks, outgoing, incoming)
    return [torch.cat(found, -1) for found in parts]


def collect(ranks: Ranks, own: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    """On rank 0 every rank's tensor, of these `shapes`; on others nothing."""
    if ranks.rank > 0:
        _swapped(ranks, [_operation(ranks, dist.isend, own.contiguous(), 0)])
        return []
    found = [own, *(own.new_empty(shape) for shape in shapes[1:])]
    _swapped(ranks, [_operation(ranks, dist.irecv, found[r], r) for r in range(1, ranks.count)])
    return found


def told(ranks: Ranks, value: bool) -> bool:
    """What rank 0's value is, on all ranks; of their processors, no GPU waits."""
    flag = torch.tensor([value], dtype=torch.uint8)
    dist.broadcast(flag, dist.get_global_rank(ranks.group, 0), ranks.group)
    return bool(flag)


def summed(ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
    """The sum of x over ranks, in place."""
    if ranks.count > 1:
        _done(ranks, dist.all_reduce, x)
    return x


def largest(ranks: Ranks, x: torch.Tensor) -> torch.Tensor:
    """The largest of x over ranks, in place; infinite where one is NaN, which NCCL would drop."""
    if ranks.count > 1:
        torch.nan_to_num(x, nan=torch.inf, posinf=torch.inf, out=x)
        _done(ranks, dist.all_reduce, x, dist.ReduceOp.MAX)
    return x


def swap(
    ranks: Ranks, outgoing: list[list[torch.Tensor]], incoming: list[list[torch.Tensor]]
) -> None:
    """Send outgoing[i][r] to each other rank r, whose parts for this one fill incoming[i][r]."""
    operations = []
    for sent, received in zip(outgoing, incoming, strict=True):
        for peer in range(ranks.count):
            if peer != ranks.rank:
                operations.append(_operation(ranks, dist.isend, sent[peer], peer))
                operations.append(_operation(ranks, dist.irecv, received[peer], peer))
    _swapped(ranks, operations)


def _operation(ranks: Ranks, kind, x: torch.Tensor, peer: int) -> dist.P2POp:
    return dist.P2POp(kind, x, dist.get_global_rank(ranks.group, peer), ranks.group)


def _swapped(ranks: Ranks, operations: list[dist.P2POp]) -> None:
    if operations:
        for work in ranks.way.start(dist.batch_isend_irecv, operations):
            work.wait()


def _done(ranks: Ranks, exchange: Callable, *arguments) -> None:
    ranks.way.start(exchange, *arguments, group=ranks.group, async_op=True).wait()
