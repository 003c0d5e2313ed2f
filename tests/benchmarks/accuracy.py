"""What INT8 costs in accuracy: relative L2 errors against float64, on this GPU or the CPU.

    python tests/benchmarks/accuracy.py

Linear layers (K 2048, N 1024, 512 tokens) in both granularities on four kinds of data, and
attention on blocks that differ, in float and in low bits. Medians of several seeds.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent  # has an attention.py too
sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE]
sys.path.append(str(HERE.parent / "support"))

import older_cards  # noqa: E402
import pack  # noqa: E402, F401
from attention import exact_linear, exact_sparse, random_proj, random_qkv  # noqa: E402
from devices import DEVICE  # noqa: E402
from goldens import relative_error  # noqa: E402
from gpu_timing import why_not_timed  # noqa: E402
from turbodiffusion_pack.kernels.block_map import block_map  # noqa: E402
from turbodiffusion_pack.kernels.int8_linear import int8_linear  # noqa: E402
from turbodiffusion_pack.kernels.int8_quant import quantize_blocks, quantize_rows  # noqa: E402
from turbodiffusion_pack.kernels.requantize import requantize_rows  # noqa: E402
from turbodiffusion_pack.kernels.sla import sla  # noqa: E402

TOKENS, K, N = 512, 2048, 1024
OUTLIER = 20.0  # times as large as the rest
BITS = {
    "sla": {},  # float32 on the CPU
    "sagesla, fp16 values": {"low_bit": True, "pv": "fp16"},
    "sagesla, fp8 values": {"low_bit": True, "pv": "fp8"},
}


def gaussian() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [1, TOKENS, K] and a weight [N, K], as all of the following."""
    return torch.randn(1, TOKENS, K, device=DEVICE), torch.randn(N, K, device=DEVICE)


def outlier_channels() -> tuple[torch.Tensor, torch.Tensor]:
    x, w = gaussian()
    x[..., torch.rand(K, device=DEVICE) < 0.01] *= OUTLIER
    return x, w


def outlier_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    x, w = gaussian()
    x[:, torch.rand(TOKENS, device=DEVICE) < 0.02] *= OUTLIER
    return x, w


def heavy_tails() -> tuple[torch.Tensor, torch.Tensor]:
    """Student's t with 3 degrees of freedom in x and 4 in w."""
    x = torch.distributions.StudentT(3.0).sample((1, TOKENS, K))
    w = torch.distributions.StudentT(4.0).sample((N, K))
    return x.to(DEVICE), w.to(DEVICE)


DATA = {
    "Gaussian": gaussian,
    "1 % outlier channels": outlier_channels,
    "2 % outlier tokens": outlier_tokens,
    "heavy tails (t, 3 and 4 d.o.f.)": heavy_tails,
}


def linear_errors(make: Callable) -> dict[str, float]:
    """Of exact and fast INT8 linears, the weight from 16 bits and from official blocks."""
    x, w = (tensor.bfloat16() for tensor in make())
    blocks, rows = (quantize_blocks(x), quantize_blocks(w)), quantize_rows(x)
    operands = {
        "exact": blocks,
        "fast, 16-bit file": (rows, quantize_rows(w)),
        "fast, official INT8 file": (rows, requantize_rows(*blocks[1])),
    }
    expected = x.double() @ w.double().mT
    return {
        name: relative_error(int8_linear(*x_q, *w_q, out_dtype=torch.float32), expected)
        for name, (x_q, w_q) in operands.items()
    }


def attention_errors(length: int) -> dict[str, float]:
    """Of SLA at top-k 0.1 and of its softmax part alone, on the same blocks as float64."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, k, v = random_qkv(1, length, 2, 128, dtype)
    proj = random_proj(128)
    chosen = block_map(q, k, 0.1)
    sparse = exact_sparse(q, k, v, chosen)
    whole = sparse + exact_linear(q, k, v, *proj, "softmax")
    errors = {}
    for name, bits in BITS.items():
        run = partial(sla, q, k, v, block_map=chosen, **bits)
        if DEVICE == "cuda" and (why := why_not_timed(lambda run=run: run(None))):
            sys.stderr.write(f"{name} not measured: {why}\n")
            continue
        out = run(None)
        errors[f"{name}: softmax alone"] = relative_error(out, sparse)
        out = run(proj)
        errors[f"{name}: with the linear branch"] = relative_error(out, whole)
    return errors


def medians(measure: Callable, seeds: int) -> dict[str, float]:
    runs = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        runs.append(measure())
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def show(title: str, errors: dict[str, float]) -> None:
    sys.stdout.write(f"{title}\n")
    for name, error in errors.items():
        sys.stdout.write(f"  {name:44s} {error:.5f}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--length", type=int, default=4000, help="tokens of attention")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = older_cards.parse(parser)
    with torch.inference_mode():
        results = {
            name: medians(lambda to=make: linear_errors(to), options.seeds)
            for name, make in DATA.items()
        }
        title = f"attention, {options.length} tokens"
        results[title] = medians(lambda: attention_errors(options.length), options.seeds)
    for name, errors in results.items():
        show(name, errors)
    if options.json:
        options.json.write_text(json.dumps({"device": DEVICE, **results}, indent=1))


if __name__ == "__main__":
    main()
