"""Times sparse-linear attention on this GPU beside ComfyUI's and dense attention, and its kernels.

    python tests/benchmarks/attention.py --shapes 14B-720P 1.3B-480P --pv fp16 fp8
    ... attention.py --card 8.6    as on an older card, see tests/support/older_cards.py

Random projections, head dim 128. Prints ms, TOPS on the selected blocks and the share of what this
card reaches at best: INT8 scores, and values in what they are multiplied in. Then the kernels of
ours from the projections on. What has no kernel here is told, not timed. comfy-kitchen's
`sol_attn` and `int8_attention` join where it is installed; they have no linear branch.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import kitchen
import older_cards
import pack  # noqa: F401
from gpu_timing import REST, Ceilings, kernel_ms, kernel_times, measure_ceilings, why_not_timed
from turbodiffusion_pack.kernels.block_map import selected_count
from turbodiffusion_pack.kernels.qk_prepare import norms_of_squares
from turbodiffusion_pack.kernels.sla import sla, sla_from_projections
from turbodiffusion_pack.kernels.sparse_attention import PV_DTYPES

SHAPES = {"14B-720P": (40, 75600), "14B-480P": (40, 32760), "1.3B-480P": (12, 32760)}
DIM, BLOCK_K = 128, 64
SQUARED = 64  # columns of which a linear of rows by mma.sync gives the sums; Hopper's 256


def random_inputs(heads: int, length: int) -> tuple:
    """What `sla_from_projections` takes, up to the projection."""
    q, k, v = (
        torch.randn(1, length, heads, DIM, device="cuda", dtype=torch.bfloat16) for _ in "qkv"
    )
    norm = torch.ones(heads * DIM, device="cuda")
    angles = torch.rand(1, length, DIM // 2, device="cuda") * 7
    weight, bias = 0.05 * torch.randn(DIM, DIM, device="cuda"), torch.zeros(DIM, device="cuda")
    return q, k, v, (norm, norm), (angles.cos(), angles.sin()), (weight, bias)


def ours_whole(inputs: tuple, topk: float, pv: str, squares: tuple | None = None) -> Callable:
    """SageSLA from the projections to the output, q and k rotated in place.

    With the `squares` of q's and k's rows as a model runs it: their linears give them.
    """
    options = {"topk": topk, "low_bit": True, "pv": pv}
    if squares is None:
        return lambda: sla_from_projections(*inputs, **options)
    *qk, v, norms, rotation, proj = inputs

    def known(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return qk[i], norms_of_squares(squares[i], qk[i][0, 0].numel())

    return lambda: sla_from_projections(
        partial(known, 0), partial(known, 1), v, norms, rotation, proj, **options
    )


def squares_of(x: torch.Tensor) -> torch.Tensor:
    """Of x [B, L, H, D], as int8_linear_and_squares gives them, [B, P, L]."""
    columns = x.flatten(2).float().unflatten(2, (-1, SQUARED))
    return columns.square().sum(-1).mT.contiguous()


class Contender(NamedTuple):
    """A way to attend, from normed and rotated q, k, v if not from the projections."""

    name: str
    sparse: bool
    run: Callable
    scores: str = "16 bit"  # what scores are multiplied in
    values: str = "16 bit"


def contenders(inputs: tuple, options) -> Iterator[Contender]:
    q, k, v, *_, proj = inputs
    topk = options.topk
    squares = squares_of(q), squares_of(k)
    for pv in options.pv:
        bits = {"scores": "int8", "values": pv}
        whole = ours_whole(inputs, topk, pv)
        yield Contender(f"sagesla {pv}, from projections", True, whole, **bits)
        whole = ours_whole(inputs, topk, pv, squares)
        yield Contender(f"sagesla {pv}, from projections and squares", True, whole, **bits)
        low_bit = {"topk": topk, "low_bit": True, "pv": pv}
        run = partial(sla, q, k, v, proj, **low_bit)
        yield Contender(f"sagesla {pv}", True, run, **bits)
    yield Contender("sla, 16 bit", True, partial(sla, q, k, v, proj, topk=topk))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if comfy := kitchen.find():
        sol = partial(comfy.sol_attn, q, k, v, topk_ratio=topk)
        yield Contender("comfy-kitchen sol_attn", True, sol, "int8")
        yield Contender("comfy-kitchen sol_attn, no tail", True, partial(sol, tail=False), "int8")
        run = partial(comfy.int8_attention, *heads_first)
        yield Contender("comfy-kitchen int8_attention", False, run, "int8")
    dense = torch.nn.functional.scaled_dot_product_attention
    yield Contender("torch, dense 16 bit", False, partial(dense, *heads_first))


def operations(heads: int, length: int, topk: float, sparse: bool) -> float:
    """Of both products, over the selected keys or all of them."""
    keys = length
    if sparse:
        keys = BLOCK_K * selected_count(topk, -(-length // BLOCK_K))
    return 4.0 * heads * DIM * length * keys


def best_ms(operations: float, contender: Contender, ceilings: Ceilings) -> float:
    """What both products, half of the operations each, take at this card's best, in ms."""
    scores = ceilings.int8_tops if contender.scores == "int8" else ceilings.value_tops("16 bit")
    return 0.5e-9 * operations * (1 / scores + 1 / ceilings.value_tops(contender.values))


def measure(shape: str, ceilings: Ceilings, options) -> Iterator[dict]:
    heads, length = SHAPES[shape]
    inputs = random_inputs(heads, length)
    for contender in contenders(inputs, options):
        row = {"shape": shape, "what": contender.name, "topk": options.topk}
        if why := why_not_timed(contender.run):
            yield row | {"not timed": why}
            continue
        time.sleep(REST)
        ms = kernel_ms(contender.run, *((options.runs, 3) if contender.sparse else (2, 1)))
        count = operations(heads, length, options.topk, contender.sparse)
        share = best_ms(count, contender, ceilings) / ms
        yield row | {"ms": round(ms, 3), "tops": round(count / ms / 1e9), "share": round(share, 3)}
    for pv in options.pv:
        yield from measure_kernels(shape, ours_whole(inputs, options.topk, pv), pv, ceilings)


def measure_kernels(shape: str, run: Callable, pv: str, ceilings: Ceilings) -> Iterator[dict]:
    """The kernels of SageSLA, where it runs in kernels."""
    if why_not_timed(run):
        return
    for row in kernel_times(run):
        what = f"  {row.calls} x {row.kernel[:60]}"
        result = {"shape": shape, "what": what, "pv": pv, "ms": round(row.ms, 3)}
        if row.gigabytes and "attention_kernel" not in row.kernel:
            gbs = 1000 * row.gigabytes / row.ms
            result |= {"gbs": round(gbs), "share": round(gbs / ceilings.copy_gbs, 3)}
        yield result


def show(result: dict) -> None:
    line = f"{result['shape']:10s} {result['what']:48s}"
    if why := result.get("not timed"):
        sys.stdout.write(f"{line} not timed: {why}\n")
        return
    line += f" {result['ms']:9.3f} ms"
    for unit, name in (("tops", "TOPS"), ("gbs", "GB/s")):
        if unit in result:
            line += f" {result[unit]:5d} {name} {result['share']:6.1%}"
    sys.stdout.write(line + (f"  ({result['pv']})" if "pv" in result else "") + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["14B-720P", "1.3B-480P"])
    parser.add_argument("--pv", nargs="+", choices=PV_DTYPES, default=list(PV_DTYPES))
    parser.add_argument("--topk", type=float, default=0.1)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = older_cards.parse(parser)
    ceilings, results = measure_ceilings(), []
    sys.stdout.write(ceilings.lines())
    if kitchen.find() is None:
        sys.stdout.write("comfy-kitchen is not installed, or has no CUDA kernels here\n")
    with torch.inference_mode():
        for shape in options.shapes:
            for result in measure(shape, ceilings, options):
                show(result)
                results.append(result)
    if options.json:
        options.json.write_text(json.dumps([ceilings._asdict(), *results], indent=1))


if __name__ == "__main__":
    main()
