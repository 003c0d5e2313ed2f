"""Times TurboDiffusion models on this GPU, through ComfyUI's Wan model and its sampler.

    COMFYUI_DIR=/path/ComfyUI python tests/benchmarks/forward.py --models 1.3B-480P 14B-720P
    ... forward.py --models 14B-720P --steps 3    a whole diffusion beside its forward passes
    ... forward.py --compilations                 what gets compiled, and when
    ... forward.py --gpus 2 --steps 4             several against one; see support/several_gpus.py
    ... forward.py --card 8.6 --json 86.json      as on an older card, for estimate.py
    ... forward.py --graph on                     each pass as one CUDA graph, wherever it can be
    ... forward.py --prompt 120                   as in a sampler's run, of a prompt of 120 tokens
    ... forward.py --prompt 120 --anew            the same, no block from a tape

Real shapes and layer counts, random INT8 weights made on the GPU, the MODEL built as TurboLoader
builds it and driven as a sampler drives it. Prints medians, the share of the arithmetic floor, peak
memory and a table of kernels with their share of what this card reaches at best. A pass of which an
op has no kernel here is told, not timed.
"""

import argparse
import contextlib
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
arguments, sys.argv = sys.argv, sys.argv[:1]

import older_cards  # noqa: E402
import pack  # noqa: E402, F401
import several_gpus  # noqa: E402
from compilations import counted  # noqa: E402
from gpu_timing import (  # noqa: E402
    GPU,
    Ceilings,
    KernelTime,
    kernel_times,
    launch_ms,
    measure_ceilings,
    median_ms,
    why_not_timed,
)
from in_comfyui import comfy  # noqa: E402
from random_checkpoint import random_checkpoint  # noqa: E402
from turbodiffusion_pack.kernels import dispatch  # noqa: E402
from turbodiffusion_pack.kernels.sparse_attention import default_pv  # noqa: E402
from turbodiffusion_pack.turbo_core.forward_time import (  # noqa: E402
    MODELS,
    TEXT_LENGTH,
    Parts,
    Shape,
    cross_attention_operations,
    linear_operations,
    self_attention_operations,
)
from turbodiffusion_pack.turbo_core.host import block_tape, pass_graph, per_run  # noqa: E402
from turbodiffusion_pack.turbo_core.host.load import build_turbo_model  # noqa: E402
from turbodiffusion_pack.turbo_core.host.patch import patch_attention  # noqa: E402
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler  # noqa: E402
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas  # noqa: E402
from turbodiffusion_pack.turbo_core.sla_settings import ATTENTIONS, SLASettings  # noqa: E402

# The share of a pass from which on launching makes it a graph.
GRAPH_FROM = {"auto": pass_graph.BOUND, "on": 0.0, "off": float("inf")}
# Names of kernels, and what is in the names of torch's.
LINEARS = "int8_linear", "linear_kernel"
SPARSE_ATTENTION = "sage_attention", "sage_attention_kernel", "sparse_attention_kernel"
DENSE_ATTENTION = "flash", "fmha", "cudnn", "text_attention"


def topk_of(settings: SLASettings) -> float | None:
    """None where attention is dense."""
    return None if settings.attention == "dense" else settings.topk


def part_of(kernel: str) -> str:
    """Which of forward_time.Parts a kernel belongs to, by its name."""
    if kernel in LINEARS:
        return "linear"
    if kernel in SPARSE_ATTENTION:
        return "attention"
    return "text" if any(name in kernel for name in DENSE_ATTENTION) else "rest"


def best_ms(part: str, shape: Shape, settings: SLASettings, ceilings: Ceilings) -> float:
    """What the products of a part take at this card's best, in ms; 0 of what moves data."""
    attended = self_attention_operations(shape, topk_of(settings)) / 1e9
    scores = values = ceilings.value_tops("16 bit")
    if settings.attention == "sagesla":
        scores, values = ceilings.int8_tops, ceilings.value_tops(default_pv(GPU))
    if part == "linear":
        return linear_operations(shape) / 1e9 / ceilings.int8_tops
    if part == "attention":
        return attended / 2 * (1 / scores + 1 / values)
    if part == "text":
        dense = attended if settings.attention == "dense" else 0
        return (cross_attention_operations(shape) / 1e9 + dense) / ceilings.value_tops("16 bit")
    return 0


def operations(part: str, shape: Shape, settings: SLASettings) -> float:
    """Of a part of a forward pass; 0 of what moves data."""
    attended = self_attention_operations(shape, topk_of(settings))
    text = cross_attention_operations(shape)
    text += attended if settings.attention == "dense" else 0
    return {"linear": linear_operations(shape), "attention": attended, "text": text}.get(part, 0)


def load(shape: Shape, settings: SLASettings):
    """A MODEL of random weights on the GPU, built as TurboLoader and SLAAttentionPatch build it."""
    model = build_turbo_model(random_checkpoint(shape))
    return patched(model, settings)


def patched(model, settings: SLASettings):
    """`model` with other attention, loaded."""
    model = patch_attention(model, settings)
    comfy.model_management.load_models_gpu([model])
    return model


def make_forward(
    model, shape: Shape, text_length: int = TEXT_LENGTH, prompt: int | None = None
) -> Callable:
    """A function that runs one forward pass on a random latent and a random text.

    Behind the first `prompt` tokens there is padding.
    """
    text = torch.randn(1, text_length, 4096, device="cuda") * 0.1
    if prompt is not None:
        text[:, prompt:] = 0
    channels = [16, shape.in_channels - 16]
    x, concat = (torch.randn(1, c, *shape.latent, device="cuda") for c in channels)
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    inputs = {
        "c_concat": concat if concat.shape[1] else None,
        "c_crossattn": text,
        "transformer_options": options,
    }
    sigma = torch.tensor([0.9338], device="cuda")
    return lambda: model.model.apply_model(x, sigma, **inputs)


def make_diffusion(model, shape: Shape, steps: int) -> Callable:
    """A function that runs a whole diffusion as SamplerCustomAdvanced does with rCMSampler."""
    conditions = {}
    if shape.in_channels > 16:
        conditions["concat_latent_image"] = torch.randn(1, 16, *shape.latent)
        conditions["concat_mask"] = torch.ones(1, 1, *shape.latent)
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": [[torch.randn(1, TEXT_LENGTH, 4096) * 0.1, conditions]]})
    guider.set_cfg(1.0)
    noise, latent = torch.randn(1, 16, *shape.latent), torch.zeros(1, 16, *shape.latent)
    sampler, sigmas = rcm_sampler("sde"), rcm_sigmas(steps, 80.0)
    return lambda: guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=0)


def measure(name: str, settings: SLASettings, ceilings: Ceilings, options) -> dict:
    shape = MODELS[name]
    model = load(shape, settings)
    run = make_forward(model, shape, prompt=options.prompt)
    if why := why_not_timed(run):
        return {"model": name, "attention": settings.attention, "not timed": why}
    for _ in range(pass_graph.EAGER_PASSES + 1):
        finite = bool(run().isfinite().all())
    followed = pass_graph._followed.get(model.model.diffusion_model)
    graph = followed and followed.graph
    torch.cuda.reset_peak_memory_stats()
    ms = median_ms(run, options.runs)
    parts = ("linear", "attention", "text") if settings.attention != "dense" else ("linear", "text")
    tops = sum(operations(part, shape, settings) for part in parts) / ms / 1e9
    floor = sum(best_ms(part, shape, settings, ceilings) for part in parts)
    result = {
        "model": name,
        "attention": settings.attention,
        "topk": settings.topk,
        "ms": round(ms, 1),
        "launch_ms": round(launch_ms(run, options.runs), 1),
        "tops": round(tops),
        "share_of_floor": round(floor / ms, 3),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "finite": finite,
        "graph_gb": round(graph.size / 1e9, 2) if graph else None,
    }
    if options.steps:
        result |= measure_diffusion(model, shape, ms, options)
    if options.rows:
        rows = [rate(row, shape, settings, ceilings) for row in kernel_times(run)]
        spent = dict.fromkeys(Parts._fields, 0.0)
        for row in rows:
            spent[part_of(row["kernel"])] += row["ms"]
        result["parts"] = {part: round(ms, 1) for part, ms in spent.items()}
        result["values"] = default_pv(GPU)
        result["between_kernels_ms"] = round(ms - sum(spent.values()), 1)
        result["kernels"] = rows
    return result


def measure_diffusion(model, shape: Shape, forward_ms: float, options) -> dict:
    """A whole diffusion, and its ratio to as many forward passes as it has steps."""
    run = make_diffusion(model, shape, options.steps)
    ms = median_ms(run, min(options.runs, 3), warmups=1)
    return {
        "steps": options.steps,
        "diffusion_ms": round(ms, 1),
        "diffusion_to_forwards": round(ms / (options.steps * forward_ms), 4),
        "diffusion_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }


def rate(row: KernelTime, shape: Shape, settings: SLASettings, ceilings: Ceilings) -> dict:
    """A kernel with its work per second and its share of this card's best."""
    result = {"kernel": row.kernel, "calls": row.calls, "ms": round(row.ms, 3)}
    part = part_of(row.kernel)
    if best := best_ms(part, shape, settings, ceilings):
        tops = operations(part, shape, settings) / row.ms / 1e9
        result |= {"tops": round(tops), "share": round(best / row.ms, 3)}
    elif row.gigabytes:
        gbs = 1000 * row.gigabytes / row.ms
        result |= {"gbs": round(gbs), "share": round(gbs / ceilings.copy_gbs, 3)}
    return result


def count_compilations(name: str, settings: SLASettings) -> list[dict]:
    """What two layers of a model compile, from an empty cache if it is the first, and after it."""
    shape = MODELS[name]._replace(num_layers=2)
    model = load(shape, settings)
    forwards = {
        name: make_forward(model, shape),
        "the same again": make_forward(model, shape),
        "another resolution": make_forward(model, shape._replace(width=640, height=640)),
        "a shorter video": make_forward(model, shape._replace(frames=33)),
        "a longer video": make_forward(model, shape._replace(frames=121)),
        "another prompt": make_forward(model, shape, text_length=333),
    }
    rounds = [first_forward(what, run) for what, run in forwards.items()]
    model = patched(model, SLASettings(settings.attention, 1.5 * settings.topk))
    return [*rounds, first_forward("another top-k", make_forward(model, shape))]


def first_forward(what: str, run: Callable) -> dict:
    """Compilations and wall time of one forward pass."""
    start = time.perf_counter()
    with counted() as names:
        run()
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"what": what, "compiled": len(names), "seconds": round(seconds, 2), "names": names}


def show(result: dict, rows: int) -> None:
    write = sys.stdout.write
    write(json.dumps({k: v for k, v in result.items() if k != "kernels"}) + "\n")
    for row in result.get("kernels", [])[:rows]:
        line = f"  {row['ms']:9.2f} ms {row['calls']:5d} x"
        for unit, name in (("tops", "TOPS"), ("gbs", "GB/s")):
            if unit in row:
                line += f" {row[unit]:5d} {name} {row['share']:6.1%}"
        write(f"{line:46s}  {row['kernel'][:80]}\n")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["1.3B-480P", "14B-720P"])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["sagesla"])
    parser.add_argument("--topk", nargs="+", type=float, default=[0.1])
    parser.add_argument("--steps", type=int, default=0, help="also a diffusion of so many steps")
    parser.add_argument("--gpus", type=int, default=1, help="that share each pass, against one")
    parser.add_argument("--compilations", action="store_true", help="count them, in two layers")
    parser.add_argument("--prompt", type=int, help="tokens before padding; TOPS count 512")
    parser.add_argument("--graph", choices=GRAPH_FROM, default="auto", help="a pass as one")
    parser.add_argument("--anew", action="store_true", help="no block from a tape")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20, help="kernels to list, 0 to skip them")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    return older_cards.parse(parser, arguments[1:])


def main() -> None:
    options = parse_options()
    pass_graph.BOUND = GRAPH_FROM[options.graph]
    if options.anew:
        block_tape.ATTEMPTS = 0
    results = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        if options.compilations:
            triton.knobs.cache.dir = folder
        if options.gpus > 1:
            several_gpus.main(options)
            return
        ceilings = None if options.compilations else measure_ceilings()
        sys.stdout.write(ceilings.lines() if ceilings else "")
        for name in options.models:
            for attention in options.attention:
                for topk in options.topk[: 1 if attention == "dense" else None]:
                    settings = SLASettings(attention, topk)
                    if options.compilations:
                        new = count_compilations(name, settings)
                    else:
                        # In a run the text's keys and values are made once.
                        with contextlib.nullcontext() if options.prompt is None else per_run.keep():
                            new = [measure(name, settings, ceilings, options)]
                    for result in new:
                        show(result, options.rows)
                    results += new
                    comfy.model_management.unload_all_models()
                    gc.collect()  # a model holds itself through its patched forwards
    if options.json:
        known = {"card": dispatch.capability(GPU), "ceilings": ceilings and ceilings._asdict()}
        everything = {**known, "results": results}
        options.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
