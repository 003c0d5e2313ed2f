"""Times the training of sparse attention on this GPU beside torch's dense attention.

    python tests/benchmarks/training_attention.py --shapes 14B-720P 1.3B-480P
    python tests/benchmarks/training_attention.py --tune --shapes 1.3B-480P
    ... training_attention.py --card 8.9    as on an older card, see tests/support/older_cards.py

Random heads of 128 channels in bfloat16. Prints ms, TFLOP/s and their share of the card's best, of
torch's backends and of our kernels, each on its own, then how many times as fast forward and
backward are together. TFLOP/s count what a kernel multiplies: 2 products forward, 3 for q's
gradient, 4 for k's and v's, 5 in a dense backward, 5 for a tangent.
"""

import argparse
import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.errors import OutOfResources

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import older_cards
import pack  # noqa: F401
from gpu_timing import kernel_ms, measure_ceilings, why_not_timed
from turbodiffusion_pack.kernels.block_map import block_map, selected_count
from turbodiffusion_pack.kernels.sla import sla
from turbodiffusion_pack.kernels.sparse_attention import (
    gradients_triton as gradients,
)
from turbodiffusion_pack.kernels.sparse_attention import triton as forward
from turbodiffusion_pack.kernels.tuning import GradientLoop, KeyLoop

SHAPES = {"14B-720P": (40, 75600), "14B-480P": (40, 32760), "1.3B-480P": (12, 32760)}
DIM, BLOCK_K = 128, 64
DENSE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LOOPS = {
    "forward": [KeyLoop(3), KeyLoop(2), KeyLoop(4), KeyLoop(3, 4)],
    "query": [
        GradientLoop(128, 64, warps=8, stages=2),
        GradientLoop(128, 64, warps=8, stages=3),
        GradientLoop(64, 64, warps=4, stages=2),
        GradientLoop(64, 64, warps=4, stages=3),
    ],
    "keys": [
        GradientLoop(64, 64, warps=4, stages=2),
        GradientLoop(64, 64, warps=4, stages=3),
        GradientLoop(64, 128, warps=8, stages=2),
        GradientLoop(64, 128, warps=8, stages=3),
        GradientLoop(64, 32, warps=4, stages=3),
    ],
    "tangent": [
        GradientLoop(128, 64, warps=8, stages=2),
        GradientLoop(64, 64, warps=4, stages=1),
        GradientLoop(64, 64, warps=4, stages=2),
    ],
}
PRODUCTS = {"forward": 2, "query": 3, "keys": 4, "tangent": 5}


class Operands(NamedTuple):
    """Of one shape: [1, L, H, D] tensors, the block map and what the forward leaves."""

    rows: tuple[torch.Tensor, ...]  # q, k, v
    d_out: torch.Tensor
    chosen: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    blocks: tuple[int, int]


def prepare(heads: int, length: int, options) -> Operands:
    q, k, v, d_out = (
        torch.randn(1, length, heads, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    )
    blocks = options.block_q, BLOCK_K
    chosen = block_map(q, k, options.topk, *blocks)
    if options.sinks:
        chosen = with_sinks(chosen, options.sinks)
    out, lse = gradients.sparse_attention_with_lse(q, k, v, chosen, *blocks)
    return Operands((q, k, v), d_out, chosen, out, lse, blocks)


def with_sinks(chosen: torch.Tensor, sinks: int) -> torch.Tensor:
    """A block map whose first `sinks` key blocks are selected by every query block."""
    first = torch.arange(sinks, dtype=torch.int32, device=chosen.device)
    rest = chosen[..., sinks:].clamp_min(sinks)
    # A clamped index stands twice; what a kernel does with it takes as long.
    return torch.cat([first.expand(*rest.shape[:-1], sinks), rest], -1).contiguous()


def dense_times(x: Operands, runs: int) -> Iterator[tuple[str, float, float]]:
    """Of torch's backends: name, ms forward and ms forward and backward."""
    q, k, v, d_out = (t.transpose(1, 2).detach() for t in (*x.rows, x.d_out))
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def train():
        torch.autograd.grad(scaled_dot_product_attention(*leaves), leaves, d_out)

    for name, backend in DENSE.items():
        try:
            with sdpa_kernel([backend]):
                with torch.no_grad():
                    ms = kernel_ms(lambda: scaled_dot_product_attention(*leaves), runs, 1)
                both = kernel_ms(train, runs, 1)
        except RuntimeError as error:
            sys.stdout.write(f"torch {name} does not run here: {str(error).splitlines()[0]}\n")
            continue
        yield name, ms, both


def our_kernels(x: Operands) -> dict[str, Callable]:
    """The steps of training in their order; lists and sums are made anew by the backward."""
    q, k, v = x.rows
    n_keys = -(-q.shape[1] // BLOCK_K)
    sums = gradients.row_sums(x.out, x.lse, x.d_out, x.blocks[0])
    lists = gradients.transpose_map(x.chosen, n_keys)
    to = x.chosen, *x.blocks
    return {
        "forward": lambda: gradients.sparse_attention_with_lse(q, k, v, *to),
        "sums": lambda: gradients.row_sums(x.out, x.lse, x.d_out, x.blocks[0]),
        "lists": lambda: gradients.transpose_map(x.chosen, n_keys),
        "order": lambda: gradients.long_first(lists[1]),
        "query": lambda: gradients.query_gradient(q, k, v, x.d_out, sums, *to),
        "keys": lambda: gradients.key_gradients(q, k, v, x.d_out, sums, lists, *x.blocks),
        "backward": lambda: gradients.sparse_attention_backward(
            q, k, v, x.out, x.lse, x.d_out, *to
        ),
        "tangent": lambda: gradients.sparse_attention_jvp(
            q, k, v, x.out, x.lse, k, v, q, *to
        ),
    }  # fmt: skip


def whole_sla(x: Operands) -> Callable | None:
    """Forward and backward of both branches through autograd; None where there is no such path."""
    leaves = [t.detach().requires_grad_() for t in x.rows]
    proj = [t.requires_grad_() for t in (torch.randn(DIM, DIM, device="cuda") / 9,
                                         torch.zeros(DIM, device="cuda"))]  # fmt: skip
    block_q, block_k = x.blocks

    def train():
        out = sla(*leaves, proj, block_map=x.chosen, block_q=block_q, block_k=block_k)
        return torch.autograd.grad(out, [*leaves, *proj], x.d_out)

    try:
        why = why_not_timed(train)
    except RuntimeError as error:
        why = str(error)
    if why:
        sys.stdout.write(f"sla with gradients does not run here: {why}\n")
        return None
    return train


def tflops(shape: str, topk: float | None, products: float, ms: float) -> float:
    """Of `products` of all heads with the selected keys, with all of them without `topk`."""
    heads, length = SHAPES[shape]
    keys = length
    if topk is not None:
        keys = BLOCK_K * selected_count(topk, -(-length // BLOCK_K))
    return 2e-9 * products * heads * DIM * length * keys / ms


def measure(shape: str, options) -> Iterator[dict]:
    x = prepare(*SHAPES[shape], options)
    row = partial(as_row, shape)
    dense = None
    for name, ms, both in dense_times(x, options.dense_runs):
        yield row(f"torch {name}, forward", ms, tflops(shape, None, 2, ms))
        yield row(f"torch {name}, backward", both - ms, tflops(shape, None, 5, both - ms))
        yield row(f"torch {name}, both", both)
        dense = both if dense is None else min(dense, both)
    total = 0.0
    for name, run in our_kernels(x).items():
        ms = kernel_ms(run, options.runs, 1)
        products = PRODUCTS.get(name)
        yield row(f"ours, {name}", ms, products and tflops(shape, options.topk, products, ms))
        total += ms if name in ("forward", "backward") else 0
    yield row("ours, forward and backward", total, times=dense and dense / total)
    if train := whole_sla(x):
        ms = kernel_ms(train, options.runs, 1)
        yield row("sla with its linear branch, both", ms, times=dense and dense / ms)


def as_row(shape: str, what: str, ms: float, rate=None, times=None) -> dict:
    numbers = {"tflops": rate, "times as fast as dense": times}
    known = {key: round(value, 2) for key, value in numbers.items() if value}
    return {"shape": shape, "what": what, "ms": round(ms, 3), **known}


def tune(shape: str, options) -> Iterator[dict]:
    """Every loop of LOOPS, with and without tensor maps, and how far its results are from those of
    what ships."""
    x = prepare(*SHAPES[shape], options)
    kernels = our_kernels(x)
    for kind in options.kernels:
        shipped = kernels[kind]()
        for loop, tma in itertools.product(LOOPS[kind], (True, False)[: 1 + options.pointers]):
            with launched(kind, loop, tma):
                try:
                    ms = kernel_ms(kernels[kind], options.runs, 1)
                except OutOfResources:
                    continue
                error = difference(kernels[kind](), shipped)
            what = f"{kind} {tuple(loop)}{'' if tma else ' pointers'}"
            rate = tflops(shape, options.topk, PRODUCTS[kind], ms)
            yield as_row(shape, what, ms, rate) | {"difference": error}


def difference(found, expected) -> float:
    """The largest of |found - expected| / |expected| over the tensors of a result."""
    pairs = [(found, expected)] if torch.is_tensor(found) else zip(found, expected, strict=True)
    return max(float((x - y).float().norm() / y.float().norm()) for x, y in pairs)


@contextlib.contextmanager
def launched(kind: str, loop: GradientLoop | KeyLoop, tma: bool) -> Iterator[None]:
    """Meanwhile kernels of a kind are launched like this."""
    module, name = gradients, "gradient_launch"
    if kind == "forward":
        module, name = forward, "attention_launch"

    def launch(capability, kernel, block, other):
        return loop.launch(block, other)

    with mock.patch.object(module, name, launch), contextlib.ExitStack() as stack:
        for each in (gradients, forward) if not tma else ():
            stack.enter_context(mock.patch.object(each, "has_tma", lambda device: False))
        yield


def show(result: dict, best: float) -> None:
    line = f"{result['shape']:10s} {result['what']:36s} {result['ms']:9.3f} ms"
    if "tflops" in result:
        line += f" {result['tflops']:6.0f} TFLOP/s {result['tflops'] / best:6.1%}"
    if "times as fast as dense" in result:
        line += f"  {result['times as fast as dense']:.2f} times as fast as dense"
    if "difference" in result:
        line += f"  differs by {result['difference']:.1e}"
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1.3B-480P", "14B-720P"])
    parser.add_argument("--topk", type=float, default=0.1)
    parser.add_argument("--block-q", type=int, choices=(128, 64), default=128)
    parser.add_argument("--sinks", type=int, default=0, help="key blocks that everybody selects")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dense-runs", type=int, default=2)
    parser.add_argument("--tune", action="store_true", help="try launches in place of comparing")
    parser.add_argument("--kernels", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--pointers", action="store_true", help="tune without tensor maps too")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = older_cards.parse(parser)
    ceilings = measure_ceilings()
    sys.stdout.write(ceilings.lines())
    results = []
    for shape in options.shapes:
        for row in (tune if options.tune else measure)(shape, options):
            show(row, ceilings.value_tops("16 bit"))
            results.append(row)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
