"""How the benchmarks time a GPU: device events, this card's own ceilings, and kernels by name."""

import collections
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import older_cards
import pack  # noqa: F401
import torch
from turbodiffusion_pack.kernels import ceilings, dispatch
from turbodiffusion_pack.kernels.ceilings import FP16, INT8, kernel_ms

GPU = torch.device("cuda", 0)
# Cards with products of their own, faster than those of mma.sync.
OWN_PRODUCTS = (9, 0), (10, 0)
REST = 1  # seconds before each contender, so that none pays for the heat of the one before


class Ceilings(NamedTuple):
    """What this card reaches at best."""

    tops: dict[str, float]  # by product, see kernels/ceilings.py
    int8_tops: float  # of those, or of a large INT8 product where the card has faster ones
    copy_gbs: float  # of a copy in memory, reading and writing

    def value_tops(self, values: str) -> float:
        """Of products with attention's weights and values, as this card runs them: SageSLA's "fp8"
        or "fp16", or "16 bit" with float32 sums, torch's."""
        if self.int8_tops != self.tops[INT8]:  # this card's own: fp8's are as fast as INT8's
            return self.int8_tops / (1 if values == "fp8" else 2)
        if values == "16 bit":
            return self.tops[FP16]
        return ceilings.value_tops(self.tops, values)

    def lines(self) -> str:
        """What stands above every table."""
        products = ", ".join(f"{name} {tops:.0f}" for name, tops in self.tops.items())
        text = f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n"
        if played := older_cards.playing():
            text += f"{played}\n"
        text += f"at best, in T/s by mma.sync: {products}; copies at {self.copy_gbs:.0f} GB/s\n"
        if self.int8_tops != self.tops[INT8]:
            text += f"INT8 by this card's own products: {self.int8_tops:.0f} TOPS\n"
        return text


def median_ms(run: Callable, runs: int, calls: int = 1, warmups: int = 2) -> float:
    """Median time of one call over `runs` groups of `calls`, after some to warm up, in ms."""
    times = [_group_ms(run, calls) for _ in range(warmups + runs)]
    return statistics.median(times[warmups:])


def _group_ms(run: Callable, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


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


def measure_ceilings() -> Ceilings:
    """What this card reaches now, in two seconds or so."""
    tops, copy_gbs = ceilings.measure(GPU)
    int8 = tops[INT8]
    if dispatch.capability(GPU) in OWN_PRODUCTS:
        int8 = max(int8, _int8_tops(75776, 5120, 13824))
    return Ceilings(tops, int8, copy_gbs)


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


class ReferenceRunsError(Exception):
    """Raised in place of running an op's torch reference."""


@contextlib.contextmanager
def kernels_only() -> Iterator[None]:
    """Meanwhile an op of ours that would run its torch reference raises.

    Raises:
        ReferenceRunsError: with the op, and why it has no kernel here.
    """

    def refuse(op: str, name: str, why: str | None) -> None:
        if name == dispatch.REFERENCE:
            raise ReferenceRunsError(f"{op} has no kernel here: {why}")

    with dispatch.listening(refuse):
        yield


def why_not_timed(run: Callable[[], object]) -> str | None:
    """Why the time of `run` would not be that of our kernels; None where it would be.

    Runs it once, up to an op that falls back to its torch reference.
    """
    try:
        with kernels_only():
            run()
    except ReferenceRunsError as error:
        return str(error)
    return None


def references_of(run: Callable[[], object]) -> str:
    """Which of our ops run their torch references in `run`, and why; empty where none does."""
    found = {}

    def note(op: str, name: str, why: str | None) -> None:
        if name == dispatch.REFERENCE:
            found[op] = why

    with dispatch.listening(note):
        run()
    return "; ".join(f"{op}: {why}" for op, why in sorted(found.items()))


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
