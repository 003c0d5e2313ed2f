"""Times INT8 linear on this GPU beside ComfyUI's, over the linears of Wan 1.3B and 14B.

    python tests/benchmarks/int8_linear.py
    python tests/benchmarks/int8_linear.py --epilogue
    ... int8_linear.py --card 8.9    as on an older card, see tests/support/older_cards.py

Gaussian activations and weights. Prints ms, TOPS and the share of what this card reaches at best:
with operands quantized already, with the activations' quantization included, and where
comfy-kitchen is installed its `int8_linear`, which always includes it. tests/benchmarks/tune.py
tries other tiles.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))

import kitchen
import older_cards
import pack  # noqa: F401
from gpu_timing import REST, kernel_ms, measure_ceilings, why_not_timed
from turbodiffusion_pack.kernels.int8_linear import int8_linear
from turbodiffusion_pack.kernels.int8_quant import quantize_blocks, quantize_rows

# L, N, K: 14B at 720p (down, up, attention), then 1.3B at 480p (up, down, attention).
SHAPES = (
    (75600, 5120, 13824),
    (75600, 13824, 5120),
    (75600, 5120, 5120),
    (32760, 8960, 1536),
    (32760, 1536, 8960),
    (32760, 1536, 1536),
)


def contenders(shape: tuple[int, int, int], epilogue: bool) -> Iterator[tuple[str, Callable]]:
    """Names and calls that all compute x w^T + b; with an epilogue ours gate and add as well."""
    length, n, k = shape
    x = torch.randn(1, length, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5
    bias = torch.randn(n, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros(1, length, n, device="cuda", dtype=torch.bfloat16)
    extra = {"out": out}
    if epilogue:
        extra |= {"gate": torch.randn(1, 1, n, device="cuda"), "residual": out}
    yield from ours("fast", quantize_rows, x, w, bias, extra)
    yield from ours("exact", quantize_blocks, x, w, bias, extra)
    if comfy := kitchen.find():
        w_q, w_scale = quantize_rows(w)
        # Without cuBLASLt it silently falls back to its Triton kernels.
        kind = comfy.registry.get_capable_backend("int8_linear")
        yield (
            f"comfy-kitchen {kind}, quantization too",
            lambda: comfy.int8_linear(x, w_q, w_scale, bias),
        )
        yield "comfy-kitchen's quantization", lambda: comfy.quantize_int8_rowwise(x[0])


def ours(granularity: str, quantize: Callable, x, w, bias, extra) -> Iterator[tuple[str, Callable]]:
    """Our linear in one granularity, on quantized activations and on 16-bit ones."""
    x_q, w_q = quantize(x), quantize(w)
    yield granularity, lambda: int8_linear(*x_q, *w_q, bias, **extra)
    yield (
        f"{granularity}, quantization too",
        lambda: int8_linear(*quantize(x), *w_q, bias, **extra),
    )


def measure(shape: tuple[int, int, int], ceiling: float, options) -> Iterator[dict]:
    for name, run in contenders(shape, options.epilogue):
        result = {"shape": shape, "what": name}
        if why := why_not_timed(run):
            yield result | {"not timed": why}
            continue
        time.sleep(REST)
        ms = kernel_ms(run, options.runs)
        result["ms"] = round(ms, 4)
        if not name.endswith("'s quantization"):
            tops = 2e-9 * shape[0] * shape[1] * shape[2] / ms
            result |= {"tops": round(tops), "share": round(tops / ceiling, 3)}
        yield result


def show(result: dict) -> None:
    shape = "x".join(map(str, result["shape"]))
    line = f"{shape:17s} {result['what']:36s}"
    if why := result.get("not timed"):
        sys.stdout.write(f"{line} not timed: {why}\n")
        return
    line += f" {result['ms']:8.3f} ms"
    if "tops" in result:
        line += f" {result['tops']:5d} TOPS {result['share']:6.1%}"
    sys.stdout.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epilogue", action="store_true", help="gate, and add to the residual")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = older_cards.parse(parser)
    ceilings = measure_ceilings()
    sys.stdout.write(ceilings.lines())
    if kitchen.find() is None:
        sys.stdout.write("comfy-kitchen is not installed, or has no CUDA kernels here\n")
    results = []
    with torch.inference_mode():
        for shape in SHAPES:
            for result in measure(shape, ceilings.int8_tops, options):
                show(result)
                results.append(result)
    if options.json:
        options.json.write_text(json.dumps([ceilings._asdict(), *results], indent=1))


if __name__ == "__main__":
    main()
