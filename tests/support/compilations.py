"""Counts what gets compiled: on a GPU while it happens, without one by asking Triton's cache keys.

The test process may run Triton's interpreter, so the work without a GPU happens in a process of its
own, where kernels stop short of compiling and launching.
"""

import contextlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent
DIM, HEADS, FFN_DIM, TEXT_LENGTH = 1536, 12, 8960, 512  # of Wan 1.3B


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The kernels that get compiled meanwhile, or loaded from Triton's cache on disk: their names.

    A kernel stands in the list once for each new combination of what it is specialized on.
    """
    import triton
    from turbodiffusion_pack.kernels import nvrtc

    names, compile_cuda = [], nvrtc.compile_cuda

    def note(*, fn, **_):
        names.append(fn.name.rpartition(".")[2])

    def note_cuda(source, target, **constants):
        names.append(f"CUDA C++ for {target}")
        return compile_cuda(source, target, **constants)

    with (
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", note),
        mock.patch.object(nvrtc, "compile_cuda", note_cuda),
    ):
        yield names


def run_block(length: int, topk: float, granularity: str, device: str, low_bit: bool = True):
    """The kernels of one fused block of Wan 1.3B, in its order, on arbitrary values."""
    from turbodiffusion_pack.kernels.int8_linear import int8_linear
    from turbodiffusion_pack.kernels.int8_quant import quantize_blocks, quantize_rows
    from turbodiffusion_pack.kernels.norm import rms_norm
    from turbodiffusion_pack.kernels.norm_quant import layer_norm_quant
    from turbodiffusion_pack.kernels.requantize import requantize_rows
    from turbodiffusion_pack.kernels.sla import sla_from_projections

    quantize = {"rows": quantize_rows, "blocks": quantize_blocks}[granularity]

    def tensor(*shape, dtype=torch.bfloat16):
        x = torch.empty(shape, dtype=dtype, device=device)
        return x if device == "cpu" else x.fill_(1)  # no kernel reads it on the CPU

    def weights(n, k):
        q, scale = tensor(n, k, dtype=torch.int8), tensor(n // 128, k // 128, dtype=torch.float32)
        if granularity == "rows":
            q, scale = requantize_rows(q, scale, backend="triton")
        return q, scale, tensor(n)

    x, text = tensor(1, length, DIM), tensor(1, TEXT_LENGTH, DIM)
    shift, scale, gate, *_ = tensor(1, 6, DIM, dtype=torch.float32).chunk(6, dim=1)
    norm, square = tensor(DIM, dtype=torch.float32), weights(DIM, DIM)
    cos, sin = (tensor(1, length, 64, dtype=torch.float32) for _ in range(2))
    proj = tensor(128, 128, dtype=torch.float32), tensor(128, dtype=torch.float32)
    common = {"backend": "triton"}
    n = layer_norm_quant(x, granularity, scale=scale, shift=shift, **common)
    q, k, v = (int8_linear(*n, *square, **common).unflatten(2, (HEADS, -1)) for _ in "qkv")
    options = {"topk": topk, "low_bit": low_bit, **common}
    y = sla_from_projections(q, k, v, (norm, norm), (cos, sin), proj, **options)
    y = quantize(y.flatten(2), **common)
    int8_linear(*y, *square, gate=gate, residual=x, **common)
    n = layer_norm_quant(x, granularity, weight=norm, bias=norm, **common)
    rms_norm(int8_linear(*n, *square, **common), norm, **common)
    rms_norm(int8_linear(*quantize(text, **common), *square, **common), norm, **common)
    int8_linear(*n, *square, residual=x, out=x, **common)
    up, down = weights(FFN_DIM, DIM), weights(DIM, FFN_DIM)
    for part in x.split(-(-length // 256) * 128, dim=1):
        n = layer_norm_quant(part, granularity, scale=scale, shift=shift, **common)
        h = quantize(int8_linear(*n, *up, **common), activation="gelu_tanh", **common)
        int8_linear(*h, *down, gate=gate, residual=part, out=part, **common)


def specializations(capability: tuple[int, int], runs: list[tuple]) -> list[list[str]]:
    """For each run, the arguments of `run_block` without the device, the kernels that a card of
    `capability` compiles for it beyond those of the runs before. Needs no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", "import compilations as c; c.work()"],
        cwd=SUPPORT,
        env=environment,
        input=json.dumps([capability, runs]),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"the kernels do not run:\n{process.stderr[-8000:]}")
    return json.loads(process.stdout)


def work():
    """Body of the process: reads runs from stdin, writes each one's new kernels to stdout."""
    torch.set_num_threads(1)
    capability, runs = json.load(sys.stdin)
    import pack  # noqa: F401
    from turbodiffusion_pack.kernels import dispatch, nvrtc

    # Before the other modules take them from there.
    dispatch.capability = lambda device: tuple(capability)
    dispatch.triton_unavailable = lambda device: None
    nvrtc.unavailable = lambda: "nothing is compiled here"
    known, new = set(), []
    _stop_before_compiling(capability, known, new)
    results = []
    for arguments in runs:
        new.clear()
        run_block(*arguments[:3], "cpu", *arguments[3:])
        results.append(list(new))
    sys.stdout.write(json.dumps(results))


def _stop_before_compiling(capability, known: set, new: list[str]) -> None:
    """Make every launch only add its kernel to `known` and, the first time, its name to `new`."""
    import triton
    from triton.backends.compiler import GPUTarget

    major, minor = capability
    target = GPUTarget("cuda", 10 * major + minor, 32)
    triton.runtime.driver.set_active(
        types.SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )

    def note(*, fn, key, **_):
        name = fn.name.rpartition(".")[2]
        if (name, str(key)) not in known:
            known.add((name, str(key)))
            new.append(name)
        return True

    triton.knobs.runtime.jit_cache_hook = note
