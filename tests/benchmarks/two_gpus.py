"""Times the fused block of a 14B model on one GPU and on several that share it by heads.

    COMFYUI_DIR=/path/ComfyUI torchrun --nproc-per-node 2 tests/benchmarks/two_gpus.py
    NCCL_P2P_DISABLE=1 COMFYUI_DIR=... torchrun ...    as between cards without peer access
    ... two_gpus.py --forward                          whole forward passes as well, 40 blocks
    ... two_gpus.py --shapes tiny                      what runs on CPUs, over gloo

A process has one card, and sees no other, as ComfyUI's workers would. Two schemes: "int8" is the
pack's own (host/split_block.py): every rank gets the normed activations in INT8, and attention's
output goes back in INT8. "bf16" is Ulysses as it is usually done: q, k and v of own tokens go to
the ranks of their heads, and the output back, in the model's 16 bits. Prints ms of a block on one
card, on all, and of the exchange by itself, and the speed-up of a forward pass that these make,
with the one gather behind its last block.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
arguments, sys.argv = sys.argv, sys.argv[:1]
# Before CUDA starts.
cards = os.environ.get("CUDA_VISIBLE_DEVICES")
own = int(os.environ["LOCAL_RANK"])
os.environ["CUDA_VISIBLE_DEVICES"] = cards.split(",")[own] if cards else str(own)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from forward import load, make_forward  # noqa: E402
from gpu_timing import median_ms, references_of  # noqa: E402
from turbodiffusion_pack.kernels.qk_prepare import square_sums  # noqa: E402
from turbodiffusion_pack.turbo_core.forward_time import MODELS, TEXT_LENGTH, Shape  # noqa: E402
from turbodiffusion_pack.turbo_core.host import block as host_block  # noqa: E402
from turbodiffusion_pack.turbo_core.host.epilogue import quantize  # noqa: E402
from turbodiffusion_pack.turbo_core.host.operations import int8_product  # noqa: E402
from turbodiffusion_pack.turbo_core.host.options import (  # noqa: E402
    MADE_ONCE,
    SPLIT,
    THIS_PASS,
)
from turbodiffusion_pack.turbo_core.host.patch import wan_model  # noqa: E402
from turbodiffusion_pack.turbo_core.host.self_attention import SomeHeads, attend  # noqa: E402
from turbodiffusion_pack.turbo_core.host.split_pass import split_over  # noqa: E402
from turbodiffusion_pack.turbo_core.host.split_block import Split, channels_of  # noqa: E402
from turbodiffusion_pack.turbo_core.parallel.exchange import (  # noqa: E402
    Ranks,
    columns_to_rows,
    gather,
    largest,
    ranks_of,
    summed,
    swap,
)
from turbodiffusion_pack.turbo_core.parallel.shares import token_shares  # noqa: E402
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    **{name: MODELS[name] for name in ("14B-720P", "14B-480P")},
    "tiny": Shape(256, 512, 3, 16, 160, 144, frames=17),  # 450 tokens, two heads
}
MIDDLE = 1  # of three blocks: neither takes tokens apart nor puts them together


def attend_in_16_bits(attn, index, normed, granularity, dtype, freqs, transformer_options):
    """What "bf16" has in place of split_block.split_attend: projections travel, not their input."""
    ranks = transformer_options[SPLIT].ranks
    shares = token_shares(freqs.shape[1], ranks.count)
    norms = {}

    def project(op, n):
        x = int8_product(op, n, dtype)  # [B, l, C]
        own = [own_row_norms(attn, x)]
        x = rows_to_columns(ranks, [x], shares)[0]  # [B, L, c]
        norms[x.data_ptr()] = gather(ranks, own, [shares])[0]
        return x

    some = SomeHeads(channels_of(attn, ranks), lambda x: norms[x.data_ptr()])
    y = attend(attn, index, normed, project, freqs, transformer_options, some)
    return quantize(columns_to_rows(ranks, [y], [shares])[0], granularity)


def own_row_norms(attn, x: torch.Tensor) -> torch.Tensor:
    """1 / root mean square of the rows of x [B, l, C], which has all heads."""
    sums = square_sums(x.unflatten(2, (-1, attn.head_dim))).double().sum(-1)
    return (sums / x.shape[-1] + attn.eps).rsqrt().float()


def rows_to_columns(ranks: Ranks, xs: list, shares: list[slice]) -> list[torch.Tensor]:
    """From [B, l, C], some rows of all columns, to [B, L, c], in one exchange."""
    outgoing, incoming, whole = [], [], []
    for x in xs:
        parts = [part.contiguous() for part in x.chunk(ranks.count, -1)]
        full = x.new_empty(x.shape[0], shares[-1].stop, parts[0].shape[-1])
        full[:, shares[ranks.rank]] = parts[ranks.rank]
        outgoing += [[part[b] for part in parts] for b in range(len(x))]
        incoming += [[sample[share] for share in shares] for sample in full]
        whole.append(full)
    swap(ranks, outgoing, incoming)
    return whole


def exchange_alone(scheme: str, shape: Shape, ranks: Ranks, dtype: torch.dtype) -> Callable:
    """A function that exchanges what one block does, of no values."""
    shares = token_shares(shape.tokens, ranks.count)
    mine, channels = shares[ranks.rank], shape.dim // ranks.count

    def zeros(*size, dtype=dtype):
        return torch.zeros(1, *size, dtype=dtype, device=DEVICE)

    tokens = mine.stop - mine.start
    if scheme == "bf16":
        projections = [zeros(tokens, shape.dim) for _ in range(3)]
        norms, y = [zeros(tokens, dtype=torch.float32)] * 2, zeros(shape.tokens, channels)

        def run():
            rows_to_columns(ranks, projections, shares)
            gather(ranks, norms, [shares] * 2)
            columns_to_rows(ranks, [y], [shares])

        return run
    n = [zeros(tokens, shape.dim, dtype=torch.int8), zeros(tokens, dtype=torch.float32)]
    y = zeros(shape.tokens, channels, dtype=torch.int8)
    sums, amax = zeros(2, shape.tokens, dtype=torch.float64), zeros(shape.tokens).float()

    def run():
        gather(ranks, n, [shares] * 2)
        summed(ranks, sums)
        largest(ranks, amax)
        columns_to_rows(ranks, [y], [shares])

    return run


def make_block(model, shape: Shape, settings: SLASettings, ranks: Ranks | None) -> Callable:
    """A function that runs the middle block: of all tokens, or with `ranks` of this rank's."""
    wan = wan_model(model)
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    x, context = (
        torch.randn(1, length, shape.dim, device=DEVICE, dtype=dtype)
        for length in (shape.tokens, TEXT_LENGTH)
    )
    e = torch.randn(1, 1, 6, shape.dim, device=DEVICE, dtype=dtype)
    freqs = wan.rope_encode(*shape.latent, device=DEVICE, dtype=dtype)
    options = {THIS_PASS: (settings, -1), MADE_ONCE: {}}
    if ranks is not None:
        x = x[:, token_shares(shape.tokens, ranks.count)[ranks.rank]]
        options[SPLIT] = Split(ranks, len(wan.blocks))
    return lambda: wan.blocks[MIDDLE](
        x, e=e, freqs=freqs, context=context, transformer_options=options
    )


def time_ms(run: Callable, runs: int) -> float:
    """Median time of a run in ms."""
    dist.barrier()
    if DEVICE == "cuda":
        return median_ms(run, runs)
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def slowest(ms: float) -> float:
    """Of what the ranks measured."""
    told = torch.tensor(ms)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return float(told)


def measure(name: str, scheme: str, ranks: Ranks, options) -> dict:
    shape, settings = SHAPES[name], SLASettings(options.attention)
    model = load(shape._replace(num_layers=3), settings, DEVICE)
    instead = attend_in_16_bits if scheme == "bf16" else host_block.split_attend
    alone = make_block(model, shape, settings, None)
    shared = make_block(model, shape, settings, ranks)
    found = {"one": slowest(time_ms(alone, options.runs))}
    with mock.patch.object(host_block, "split_attend", instead):
        slow = references_of(shared)
        found["shared"] = slowest(time_ms(shared, options.runs))
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    exchange = exchange_alone(scheme, shape, ranks, dtype)
    found["exchange"] = slowest(time_ms(exchange, options.runs))
    shares = token_shares(shape.tokens, ranks.count)
    tokens = shares[ranks.rank].stop - shares[ranks.rank].start
    mine = torch.zeros(1, tokens, shape.dim, dtype=dtype, device=DEVICE)
    found["last_gather"] = slowest(time_ms(lambda: gather(ranks, [mine], [shares]), options.runs))
    one, all_of_it = (shape.num_layers * found[key] for key in ("one", "shared"))
    result = {
        "model": name,
        "attention": settings.attention,
        "scheme": scheme,
        "ranks": ranks.count,
        "peer_access": os.environ.get("NCCL_P2P_DISABLE", "0") == "0",
        **{f"{key}_ms": round(ms, 3) for key, ms in found.items()},
        "predicted_speed_up": round(one / (all_of_it + found["last_gather"]), 3),
    }
    return result | ({"references": slow} if slow else {})


def measure_forward(name: str, ranks: Ranks, options) -> dict:
    """Whole forward passes, on one card and shared in the pack's own scheme."""
    shape = SHAPES[name]
    model = load(shape, SLASettings(options.attention), DEVICE)
    found, outputs = {}, {}
    for key, one in (("one", model), ("shared", split_over(model, ranks))):
        torch.manual_seed(1)
        run = make_forward(one, shape, device=DEVICE)
        outputs[key] = run()
        found[key] = slowest(time_ms(run, options.runs))
    distance = (outputs["shared"] - outputs["one"]).norm() / outputs["one"].norm()
    return {
        "model": name,
        "whole_forward": True,
        "ranks": ranks.count,
        **{f"{key}_ms": round(ms, 1) for key, ms in found.items()},
        "speed_up": round(found["one"] / found["shared"], 3),
        "relative_distance": float(distance),
    }


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["14B-720P", "14B-480P"])
    parser.add_argument("--schemes", nargs="+", choices=["int8", "bf16"], default=["int8", "bf16"])
    parser.add_argument("--attention", choices=["sagesla", "sla", "dense"], default="sagesla")
    parser.add_argument("--forward", action="store_true", help="whole forward passes as well")
    parser.add_argument("--runs", type=int, default=5)
    return parser.parse_args(arguments[1:])


def say(result: dict) -> None:
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


def main() -> None:
    options = parse_options()
    dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo")
    torch.manual_seed(0)  # every rank has the same weights
    with torch.inference_mode():
        for name in options.shapes:
            for scheme in options.schemes:
                say(measure(name, scheme, ranks_of(), options))
            if options.forward:
                say(measure_forward(name, ranks_of(), options))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
