"""Times sparse-linear attention on this GPU, from the projections to the output, and its stages.

    python tests/benchmarks/attention.py --shapes 14B-720P 1.3B-480P --pv fp16 fp8

Random projections, head dim 128. Prints medians in milliseconds; the stages are what
`sla_from_projections` calls in low bits, one by one.
"""

import argparse
import json
import os
import sys
import types
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT]
sys.path.append(str(ROOT / "tests" / "support"))
pack = types.ModuleType("turbodiffusion_pack")
pack.__path__ = [str(ROOT)]
sys.modules["turbodiffusion_pack"] = pack

from gpu_timing import median_ms  # noqa: E402
from turbodiffusion_pack.kernels.block_map import (  # noqa: E402
    center_means,
    select_blocks,
    selected_count,
)
from turbodiffusion_pack.kernels.linear_attention import (  # noqa: E402
    LinearBranch,
    key_value_state_and_maximum,
)
from turbodiffusion_pack.kernels.qk_prepare import prepare  # noqa: E402
from turbodiffusion_pack.kernels.sla import sla_from_projections  # noqa: E402
from turbodiffusion_pack.kernels.sparse_attention import PV_DTYPES  # noqa: E402
from turbodiffusion_pack.kernels.sparse_attention import triton as sparse  # noqa: E402

SHAPES = {"14B-720P": (40, 75600), "1.3B-480P": (12, 32760)}  # heads and tokens
DIM, BLOCK_Q, BLOCK_K = 128, 128, 64


def random_inputs(heads: int, length: int) -> tuple[torch.Tensor, ...]:
    """What `sla_from_projections` takes, up to the projection's bias."""
    q, k, v = (
        torch.randn(1, length, heads, DIM, device="cuda", dtype=torch.bfloat16) for _ in "qkv"
    )
    norm = torch.ones(heads * DIM, device="cuda")
    angles = torch.rand(1, length, DIM // 2, device="cuda") * 7
    weight, bias = 0.05 * torch.randn(DIM, DIM, device="cuda"), torch.zeros(DIM, device="cuda")
    return q, k, v, norm, norm, angles.cos(), angles.sin(), weight, bias


def stages(inputs: tuple[torch.Tensor, ...], topk: float, pv: str) -> dict:
    """By name, a function that runs one stage on what the stages before it give."""
    q, k, v, q_norm, k_norm, cos, sin, weight, bias = inputs
    dtype = PV_DTYPES[pv]
    queries = prepare(q, q_norm, cos, sin, block=BLOCK_Q, quantize=True)
    keys = prepare(k, k_norm, cos, sin, block=BLOCK_K)
    k_means, k_mean = center_means(keys.means, k.shape[1], BLOCK_K)
    count = selected_count(topk, k_means.shape[2])
    chosen = select_blocks(queries.means, k_means, count)
    state, normalizer, v_max = key_value_state_and_maximum(keys.x, v)
    branch = LinearBranch(state, normalizer, weight, bias)
    operands = sparse.quantize(
        queries.x, keys.x, v, k_mean, dtype, BLOCK_Q, BLOCK_K, DIM**-0.5,
        (queries.q, queries.scale), v_max,
    )  # fmt: skip
    return {
        "whole": lambda: sla_from_projections(*inputs, topk=topk, low_bit=True, pv=pv),
        "prepare q": lambda: prepare(q, q_norm, cos, sin, block=BLOCK_Q, quantize=True),
        "prepare k": lambda: prepare(k, k_norm, cos, sin, block=BLOCK_K),
        "select": lambda: select_blocks(queries.means, k_means, count),
        "quantize k": lambda: sparse.quantize_blocks(keys.x, BLOCK_K, k_mean),
        "values": lambda: sparse.quantize_values(v, dtype, BLOCK_K, v_max),
        "state": lambda: key_value_state_and_maximum(keys.x, v),
        "sparse": lambda: sparse.sage_attention(
            queries.x, operands, chosen, BLOCK_Q, BLOCK_K, None
        ),
        "sparse and linear": lambda: sparse.sage_attention(
            queries.x, operands, chosen, BLOCK_Q, BLOCK_K, branch
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--pv", nargs="+", choices=PV_DTYPES, default=list(PV_DTYPES))
    parser.add_argument("--topk", type=float, default=0.1)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args()
    results = []
    with torch.inference_mode():
        for shape in options.shapes:
            inputs = random_inputs(*SHAPES[shape])
            for pv in options.pv:
                times = {
                    name: round(median_ms(run, options.runs), 3)
                    for name, run in stages(inputs, options.topk, pv).items()
                }
                results.append({"shape": shape, "pv": pv, "topk": options.topk, "ms": times})
                sys.stdout.write(json.dumps(results[-1]) + "\n")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
