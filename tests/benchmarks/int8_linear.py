"""Times INT8 linear on this GPU, over the linears of Wan 1.3B at 480p and 14B at 720p.

    python tests/benchmarks/int8_linear.py
    python tests/benchmarks/int8_linear.py --sweep --granularity rows

Prints ms, TOPS and the share of the card's INT8 peak. --sweep also times the tiles that
linear_config chooses between, and marks the fastest and the one that ships.
"""

import argparse
import json
import os
import sys
import types
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT]
sys.path.append(str(ROOT / "tests" / "support"))
pack = types.ModuleType("turbodiffusion_pack")
pack.__path__ = [str(ROOT)]
sys.modules["turbodiffusion_pack"] = pack

from gpu_timing import median_ms  # noqa: E402
from turbodiffusion_pack.kernels.int8_linear import int8_linear, triton_kernels  # noqa: E402

# L, N, K: 14B at 720p (down, up, attention), then 1.3B at 480p (up, down, attention).
SHAPES = (
    (75600, 5120, 13824),
    (75600, 13824, 5120),
    (75600, 5120, 5120),
    (32760, 8960, 1536),
    (32760, 1536, 8960),
    (32760, 1536, 1536),
)
# BLOCK_M, BLOCK_N, warps, stages, GROUP.
TILES = {
    "rows": (
        (128, 256, 8, 4, 8),
        (128, 256, 8, 4, 16),
        (128, 256, 8, 3, 8),
        (256, 128, 8, 4, 8),
        (128, 128, 8, 3, 8),
        (128, 128, 4, 3, 8),
        (128, 128, 4, 3, 16),
    ),
    "blocks": (
        (128, 128, 4, 3, 8),
        (128, 128, 4, 3, 16),
        (128, 128, 8, 3, 8),
        (128, 128, 8, 4, 8),
    ),
}
CALLS = 10  # between two device events, so that launches do not show


def operands(granularity: str, length: int, n: int, k: int, epilogue: bool) -> dict:
    """Arguments of int8_linear; with an epilogue, as the end of an attention or an MLP has it."""
    blocks = granularity == "blocks"
    x_scale = (1, -(-length // 128), -(-k // 128)) if blocks else (1, length)
    w_scale = (-(-n // 128), -(-k // 128)) if blocks else (n,)
    integers = {"device": "cuda", "dtype": torch.int8}
    arguments = {
        "x_q": torch.randint(-127, 128, (1, length, k), **integers),
        "x_scale": torch.rand(x_scale, device="cuda") * 1e-2,
        "w_q": torch.randint(-127, 128, (n, k), **integers),
        "w_scale": torch.rand(w_scale, device="cuda") * 1e-3,
        "bias": torch.randn(n, device="cuda", dtype=torch.bfloat16),
    }
    out = torch.zeros(1, length, n, device="cuda", dtype=torch.bfloat16)
    if epilogue:
        gate = torch.randn(1, 1, n, device="cuda")
        arguments |= {"gate": gate, "residual": out}
    return arguments | {"out": out}


def tile_config(block_m: int, block_n: int, warps: int, stages: int, group: int) -> dict[str, int]:
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 128, "GROUP": group}
    return {**tile, "num_warps": warps, "num_stages": stages}


def shipped_config(granularity: str, n: int, k: int) -> dict[str, int]:
    capability = torch.cuda.get_device_capability()
    by_blocks, tma = granularity == "blocks", capability >= (9, 0)
    return triton_kernels.linear_config(capability, by_blocks, tma, n, k)


def measure(granularity: str, shape: tuple[int, int, int], config: dict, options) -> dict:
    arguments = operands(granularity, *shape, options.epilogue)
    with mock.patch.object(triton_kernels, "linear_config", lambda *_: config):
        ms = median_ms(lambda: int8_linear(**arguments, backend="triton"), options.runs, CALLS)
    tops = 2 * shape[0] * shape[1] * shape[2] / ms / 1e9
    numbers = {"ms": round(ms, 3), "tops": round(tops), "share": round(tops / options.ceiling, 3)}
    return {"granularity": granularity, "shape": shape, "config": config, **numbers}


def measure_shape(granularity: str, shape: tuple[int, int, int], options) -> list[dict]:
    """The shipped configuration of one shape or, in a sweep, every tile with its marks."""
    shipped = shipped_config(granularity, *shape[1:])
    configs = [shipped]
    if options.sweep:
        configs += [c for t in TILES[granularity] if (c := tile_config(*t)) != shipped]
    results = [measure(granularity, shape, config, options) for config in configs]
    fastest = min(results, key=lambda result: result["ms"])
    for result in results:
        result["marks"] = ["shipped"] * (result is results[0])
        result["marks"] += ["fastest"] * (options.sweep and result is fastest)
    return results


def show(result: dict) -> None:
    c = result["config"]
    tile = f"{c['BLOCK_M']}x{c['BLOCK_N']} w{c['num_warps']} s{c['num_stages']} g{c['GROUP']}"
    shape = "x".join(map(str, result["shape"]))
    numbers = f"{result['ms']:8.3f} ms {result['tops']:5d} TOPS {result['share']:6.1%}"
    line = f"{result['granularity']:6s} {shape:17s} {tile:18s} {numbers}  "
    sys.stdout.write(line + ", ".join(result["marks"]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--granularity", nargs="+", choices=TILES, default=list(TILES))
    parser.add_argument("--sweep", action="store_true", help="time every tile of the table")
    parser.add_argument("--epilogue", action="store_true", help="gate, and add to the residual")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--ceiling", type=float, default=1979, help="the card's INT8 TOPS")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args()
    results = []
    for granularity in options.granularity:
        for shape in SHAPES:
            rows = measure_shape(granularity, shape, options)
            for row in rows:
                show(row)
            results += rows
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
