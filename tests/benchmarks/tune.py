"""Times a kernel over shapes and launch configurations, for the rows of kernels/tuning.py.

    python tests/benchmarks/tune.py int8_linear_rows int8_linear_blocks --json linear.json
    ... tune.py int8_linear_rows --card 8.9    as on an older card, see tests/support/older_cards.py

Prints every configuration with its time and its share of what this card reaches at best, and for
each kind of shape the one that loses the least over all of them.
"""

import argparse
import collections
import json
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import older_cards
import pack  # noqa: F401
from gpu_timing import GPU, Ceilings, kernel_ms, measure_ceilings
from turbodiffusion_pack.kernels import dispatch, int8_quant, norm, norm_quant
from turbodiffusion_pack.kernels import int8_linear as linear
from turbodiffusion_pack.kernels.tuning import RowLoop, Tile

# Rows and columns of activations: 14B at 720p, 1.3B at 480p.
ACTIVATIONS = ((75600, 5120), (32760, 1536))
# What GELU and INT8 take from the up-projection, by parts of the tokens.
FFN_ACTIVATIONS = ((25216, 13824), (32760, 8960))
# L, N, K: 14B at 720p (down, up, attention), then 1.3B at 480p (up, down, attention).
PRODUCTS = (
    (75600, 5120, 13824),
    (75600, 13824, 5120),
    (75600, 5120, 5120),
    (32760, 8960, 1536),
    (32760, 1536, 8960),
    (32760, 1536, 1536),
)
ROW_TILES = (
    Tile(128, 256, warps=8, stages=4),
    Tile(128, 256, warps=8, stages=4, group=16),
    Tile(128, 256, warps=8, stages=3),
    Tile(256, 128, warps=8, stages=4),
    Tile(128, 128, warps=8, stages=3),
    Tile(128, 128, warps=4, stages=3),
    Tile(128, 128, warps=4, stages=3, group=16),
)
BLOCK_TILES = (
    Tile(128, 128, warps=4, stages=3),
    Tile(128, 128, warps=4, stages=3, group=16),
    Tile(128, 128, warps=8, stages=3),
    Tile(128, 128, warps=8, stages=4),
)
WARPS = 1, 2, 4, 8, 16, 32
# Warps and programs of a multiprocessor.
ROW_LOOPS = [
    RowLoop(warps, stages, programs)
    for warps, programs in ((1, 12), (1, 16), (2, 6), (4, 3), (4, 4), (8, 2), (8, 4), (16, 1))
    for stages in (2, 3)
]


class Kernel(NamedTuple):
    """What to tune: shapes, the call, and the function whose launch configuration is tried."""

    shapes: tuple[tuple[int, ...], ...]
    prepare: Callable  # of a shape: a function that runs the kernel on random operands
    module: types.ModuleType  # the one that calls the function below
    config: str
    candidates: Callable  # of what ships: all that is tried beside it
    bytes_per_element: int = 0  # moved per element of a memory-bound kernel, 0 for a product


def random_rows(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(1, *shape, device="cuda", dtype=torch.bfloat16)


def prepare_linear(shape: tuple[int, int, int], granularity: str) -> Callable:
    length, n, k = shape
    blocks = granularity == "blocks"
    x_scale = (1, -(-length // 128), -(-k // 128)) if blocks else (1, length)
    w_scale = (-(-n // 128), -(-k // 128)) if blocks else (n,)
    x, w = (
        torch.randn(size, device="cuda").mul_(28).round_().clamp_(-128, 127).to(torch.int8)
        for size in ((1, length, k), (n, k))
    )
    scales = torch.rand(x_scale, device="cuda") * 1e-2, torch.rand(w_scale, device="cuda") * 1e-3
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(1, length, n, device="cuda", dtype=torch.bfloat16)
    # Triton's: on Hopper the CUDA kernel stands in for it.
    operands = x, scales[0], w, scales[1], bias, None, None, out
    return lambda: linear.triton_kernels.linear(*operands)


def prepare_layer_norm(shape: tuple[int, int]) -> Callable:
    x = random_rows(shape)
    scale, shift = (torch.randn(1, 1, shape[1], device="cuda") for _ in range(2))
    operands = x, "rows", None, None, scale, shift, 1e-6  # as above
    return lambda: norm_quant.triton_kernels.layer_norm_quant(*operands)


def prepare_quantize(shape: tuple[int, int], activation: str | None) -> Callable:
    x = random_rows(shape)
    return lambda: int8_quant.triton_kernels.quantize_rows(x, activation)  # as above


def prepare_rms_norm(shape: tuple[int, int]) -> Callable:
    x, weight = random_rows(shape), torch.ones(shape[1], device="cuda")
    return lambda: norm.rms_norm(x, weight, backend="triton")


def other_tiles(tiles: tuple[Tile, ...]) -> Callable:
    return lambda shipped: [launch for tile in tiles if (launch := tile.launch()) != shipped]


def other_warps(shipped: dict) -> list[dict]:
    return [shipped | {"num_warps": n} for n in WARPS if n != shipped["num_warps"]]


def other_loops(shipped: RowLoop) -> list[RowLoop]:
    return [loop for loop in ROW_LOOPS if loop != shipped]


def settings(launch: dict | RowLoop) -> dict:
    return launch._asdict() if isinstance(launch, RowLoop) else launch


def loop_kernel(module, shapes, prepare) -> Kernel:
    return Kernel(shapes, prepare, module.triton_kernels, "of_width", other_loops, 3)


def rows_kernel(module, shapes, prepare, bytes_per_element: int) -> Kernel:
    launcher = module.triton_kernels
    return Kernel(shapes, prepare, launcher, "row_launch", other_warps, bytes_per_element)


def linear_kernel(granularity: str, tiles: tuple[Tile, ...]) -> Kernel:
    def prepare(shape):
        return prepare_linear(shape, granularity)

    return Kernel(PRODUCTS, prepare, linear.triton_kernels, "linear_config", other_tiles(tiles))


KERNELS = {
    "int8_linear_rows": linear_kernel("rows", ROW_TILES),
    "int8_linear_blocks": linear_kernel("blocks", BLOCK_TILES),
    "layer_norm_quant": loop_kernel(norm_quant, ACTIVATIONS, prepare_layer_norm),
    "quantize_rows": rows_kernel(int8_quant, ACTIVATIONS, lambda s: prepare_quantize(s, None), 3),
    "quantize_rows_gelu": loop_kernel(
        int8_quant, FFN_ACTIVATIONS, lambda s: prepare_quantize(s, "gelu_tanh")
    ),
    "rms_norm": rows_kernel(norm, ACTIVATIONS, prepare_rms_norm, 4),
}


def shipped_launch(kernel: Kernel, run: Callable) -> dict | RowLoop:
    """What the pack itself launches with."""
    original, seen = getattr(kernel.module, kernel.config), []

    def noted(*args):
        seen.append(original(*args))
        return seen[-1]

    with mock.patch.object(kernel.module, kernel.config, noted):
        run()
    return seen[0]


def measure(name: str, shape: tuple[int, ...], ceilings: Ceilings) -> list[dict]:
    """All configurations of one shape, fastest first."""
    kernel = KERNELS[name]
    run = kernel.prepare(shape)
    shipped = shipped_launch(kernel, run)
    results = []
    for launch in (shipped, *kernel.candidates(shipped)):
        with mock.patch.object(kernel.module, kernel.config, lambda *_, to=launch: to):
            try:
                ms = kernel_ms(run)
            except OutOfResources:
                continue
        result = {"kernel": name, "shape": shape, "launch": settings(launch), "ms": round(ms, 4)}
        results.append(result | {"shipped": launch is shipped} | rate(kernel, shape, ms, ceilings))
    return sorted(results, key=lambda result: result["ms"])


def rate(kernel: Kernel, shape: tuple[int, ...], ms: float, ceilings: Ceilings) -> dict:
    """Work per second, and its share of the ceiling."""
    if kernel.bytes_per_element:
        gbs = math.prod(shape) * kernel.bytes_per_element / ms / 1e6
        return {"gbs": round(gbs), "share": round(gbs / ceilings.copy_gbs, 3)}
    tops = 2e-9 * math.prod(shape) / ms
    return {"tops": round(tops), "share": round(tops / ceilings.int8_tops, 3)}


def best_launches(results: list[dict]) -> dict[str, dict]:
    """For each kind of shape the configuration that loses the least, in geometric mean."""
    losses = collections.defaultdict(lambda: collections.defaultdict(list))
    fastest = {result["shape"]: result["ms"] for result in reversed(results)}
    for result in results:
        loss = math.log(result["ms"] / fastest[result["shape"]])
        losses[kind_of(result)][json.dumps(result["launch"])].append(loss)
    best = {}
    for kind, by_launch in losses.items():
        tried = max(map(len, by_launch.values()))
        whole = {launch: sum(x) for launch, x in by_launch.items() if len(x) == tried}
        best[kind] = json.loads(min(whole, key=whole.get))
    return best


def kind_of(result: dict) -> str:
    """The kinds of kernels/tuning.py: a product's granularity and shape, a row's width."""
    _, n, *k = result["shape"]
    if not k:
        return f"{n} columns"
    if result["kernel"] == "int8_linear_blocks":
        return "blocks"
    return "wide" if k[0] > 2048 and n >= 3072 else "rows"


def show(result: dict) -> None:
    rate = f"{result['tops']:5d} TOPS" if "tops" in result else f"{result['gbs']:5d} GB/s"
    shape = "x".join(map(str, result["shape"]))
    launch = ", ".join(f"{key} {value}" for key, value in result["launch"].items())
    mark = "  <- shipped" if result["shipped"] else ""
    numbers = f"{result['ms']:8.3f} ms {rate} {result['share']:6.1%}"
    sys.stdout.write(f"{result['kernel']:18s} {shape:17s} {numbers}  {launch}{mark}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernels", nargs="+", choices=KERNELS, metavar="KERNEL")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = older_cards.parse(parser)
    ceilings, everything = measure_ceilings(), []
    sys.stdout.write(ceilings.lines())
    with torch.inference_mode():
        for name in options.kernels:
            results = []
            for shape in KERNELS[name].shapes:
                for result in measure(name, shape, ceilings):
                    show(result)
                    results.append(result)
            card = dispatch.capability(GPU)
            for kind, launch in best_launches(results).items():
                sys.stdout.write(f"{name}: {card}, {kind}: {launch}\n")
            everything += results
    if options.json:
        options.json.write_text(json.dumps([ceilings._asdict(), *everything], indent=1))


if __name__ == "__main__":
    main()
