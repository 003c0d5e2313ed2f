"""What a card reaches at best: products by loops that do nothing else, and a copy in memory.

A kernel's speed divided by these is the share of the card that it uses. The products are those of
mma.sync, which every card has; Hopper and data center Blackwell also have faster ones of their own.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import nvrtc
from .dispatch import capability, multiprocessors

SOURCE = Path(__file__).with_suffix(".cu")
# Names by their place in ceilings.cu; what sums are kept in follows where it is not 32 bits.
INT8, FP16, FP16_SHORT, FP8, FP8_SHORT = PRODUCTS = (
    "int8", "fp16", "fp16 in fp16 sums", "fp8", "fp8 in fp16 sums"
)  # fmt: skip
FP8_SHORT_FROM = 12, 8  # the first NVRTC that knows it
# Of ceilings.cu: products in a round; and how many threads and programs an SM has at a time.
CHAINS, THREADS, BLOCKS = 8, 256, 2
ROUNDS = 16384  # some ms: an H100 takes 2, an RTX 3090 up to 10
COPY_BYTES = 2**28  # more than any L2 cache holds
Operands = nvrtc.operands(pointers="out", integers="rounds")


class Ceilings(NamedTuple):
    """What a card reaches at best."""

    tops: dict[str, float]  # 10^12 operations a second by product, see PRODUCTS
    copy_gbs: float  # GB/s of a copy in memory, reading and writing counted


def measure(device: torch.device) -> Ceilings:
    """What the GPU `device` (with its index) reaches now.

    Takes about two seconds, and half a GiB of its memory.

    Raises:
        RuntimeError: NVRTC or the driver does not work.
    """
    card, real = capability(device), torch.cuda.get_device_capability(device)
    with torch.cuda.device(device):
        return Ceilings(
            {name: _tops(name, device) for name in products_of(card) if name in products_of(real)},
            _copy_gbs(device),
        )


def value_tops(tops: dict[str, float], pv: str) -> float:
    """Of products with SageSLA's weights and values in "fp8" or "fp16"; the card reaches `tops`.

    Their sums are float16 where that is faster; emulated fp8 goes by the products of fp16.
    """
    kinds = (FP16, FP16_SHORT, FP8, FP8_SHORT) if pv == "fp8" else (FP16, FP16_SHORT)
    return max(tops[kind] for kind in kinds if kind in tops)


def products_of(card: tuple[int, int]) -> tuple[str, ...]:
    """The products that the tensor cores of this compute capability take through mma.sync.

    Those of fp8 are Ada's and consumer Blackwell's. The compilers take them for Hopper and data
    center Blackwell, too, and make conversions and products of fp16 of them.
    """
    if card != (8, 9) and card < (12, 0):
        return PRODUCTS[:3]
    return PRODUCTS if nvrtc.version() >= FP8_SHORT_FROM else PRODUCTS[:4]


def operations(name: str) -> int:
    """Of one instruction of a warp, 16 x 8 sums: a product and a sum are two."""
    return 2 * 16 * 8 * (16 if name in (FP16, FP16_SHORT) else 32)


def kernel_ms(run: Callable[[], object], runs: int = 7, calls: int = 5) -> float:
    """Median time of a call on the GPU, in ms, without what launching costs the CPU.

    Of `runs` groups of `calls`; the GPU sleeps first, so that the CPU gets ahead of it.
    """
    times = [_group_ms(run, calls) for _ in range(runs + 1)]
    return statistics.median(times[1:])


def _group_ms(run: Callable[[], object], calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # about a millisecond
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def _tops(name: str, device: torch.device) -> float:
    blocks = BLOCKS * multiprocessors(device)
    out = torch.empty(1, dtype=torch.int32, device=device)
    arguments = Operands(nvrtc.address(out), ROUNDS)
    kernel = _kernel(name, device)
    # The best: whatever else runs meanwhile makes it slower.
    ms = min(kernel_ms(lambda: kernel.launch(blocks, THREADS, arguments), 1, 1) for _ in range(5))
    return operations(name) * ROUNDS * CHAINS * THREADS // 32 * blocks / ms / 1e9


def _kernel(name: str, device: torch.device) -> nvrtc.Kernel:
    target = nvrtc.target_of(capability(device), device)
    place = PRODUCTS.index(name)
    return nvrtc.load(SOURCE, "products", target, 0, Operands, device.index, PRODUCT=place)


def _copy_gbs(device: torch.device) -> float:
    source = torch.empty(COPY_BYTES, device=device, dtype=torch.int8)
    target = torch.empty_like(source)
    return 2e-6 * COPY_BYTES / kernel_ms(lambda: target.copy_(source))
