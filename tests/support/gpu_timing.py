"""How the benchmarks time a GPU: device events, this card's own ceilings, and kernels by name."""

import collections
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch

QUEUE_CYCLES = 2_000_000  # about a millisecond, in which the CPU gets ahead


class Ceilings(NamedTuple):
    """What this card reaches at best."""

    int8_tops: float  # of a large INT8 product
    copy_gbs: float  # of a copy in memory, reading and writing


def median_ms(run: Callable, runs: int, calls: int = 1, warmups: int = 2) -> float:
    """Median time of one call over `runs` groups of `calls`, after some to warm up, in ms."""
    times = [_group_ms(run, calls, 0) for _ in range(warmups + runs)]
    return statistics.median(times[warmups:])


def kernel_ms(run: Callable, runs: int = 7, calls: int = 5) -> float:
    """As `median_ms`, without what launching costs the CPU: for kernels shorter than that."""
    times = [_group_ms(run, calls, QUEUE_CYCLES) for _ in range(runs + 1)]
    return statistics.median(times[1:])


def launch_ms(run: Callable, runs: int) -> float:
    """Median time that the CPU takes to launch one call, ms; the GPU has nothing else to do."""
    times = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(times)


def _group_ms(run: Callable, calls: int, asleep: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if asleep:
        torch.cuda._sleep(asleep)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def measure_ceilings() -> Ceilings:
    """What this card reaches now, in a second or so."""
    return Ceilings(_int8_tops(75776, 5120, 13824), _copy_gbs(2**29))


def _int8_tops(m: int, n: int, k: int) -> float:
    """The better of two INT8 products, ours and cuBLASLt's."""
    from turbodiffusion_pack.kernels.int8_linear import int8_linear

    # As Gaussian values are in INT8: what the bits are costs power, and so speed.
    x, w = (
        torch.randn(shape, device="cuda").mul_(28).round_().clamp_(-128, 127).to(torch.int8)
        for shape in ((1, m, k), (n, k))
    )
    x_scale, w_scale = (torch.full(shape, 1e-3, device="cuda") for shape in ((1, m), (n,)))
    out = torch.empty(1, m, n, device="cuda", dtype=torch.bfloat16)
    ours = kernel_ms(lambda: int8_linear(x, x_scale, w, w_scale, out=out), 5, 2)
    cublas = kernel_ms(lambda: torch._int_mm(x[0], w.t()), 5, 2)
    return 2e-9 * m * n * k / min(ours, cublas)


def _copy_gbs(size: int) -> float:
    source = torch.empty(size, device="cuda", dtype=torch.int8)
    target = torch.empty_like(source)
    return 2e-6 * size / kernel_ms(lambda: target.copy_(source))


class KernelTime(NamedTuple):
    """All launches of one kernel during a run."""

    kernel: str
    calls: int
    ms: float
    gigabytes: float | None  # of the tensors it is given; None for what is not Triton's


def kernel_times(run: Callable) -> list[KernelTime]:
    """GPU time of one run by kernel, most first."""
    with _traffic() as gigabytes:
        run()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    rows = [
        KernelTime(e.key, e.count, e.device_time_total / 1000, gigabytes.get(e.key))
        for e in profile.key_averages()
        if e.device_time_total
    ]
    return sorted(rows, key=lambda row: -row.ms)


@contextlib.contextmanager
def _traffic() -> Iterator[dict[str, float]]:
    """Gigabytes of tensors that Triton kernels are given meanwhile, by kernel.

    Each tensor counts once, twice where a kernel has it twice, as input and output. What it cannot
    see: a tensor that is read in part, or again and again.
    """
    from triton.runtime.jit import JITFunction

    gigabytes, launch = collections.Counter(), JITFunction.run

    def noted(self, *args, **kwargs):
        gigabytes[self.fn.__name__] += _bytes_of([*args, *kwargs.values()]) / 1e9
        return launch(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", noted):
        yield gigabytes


def _bytes_of(arguments: list) -> int:
    # A tensor descriptor stands for its tensor; of an expanded dimension one index is read.
    tensors = [getattr(argument, "base", argument) for argument in arguments]
    sizes, seen = 0, collections.Counter()
    for x in tensors:
        if not isinstance(x, torch.Tensor):
            continue
        seen[x.data_ptr()] += 1
        if seen[x.data_ptr()] <= 2:
            shape = [n for n, step in zip(x.shape, x.stride(), strict=True) if step]
            sizes += torch.Size(shape).numel() * x.itemsize
    return sizes
