"""Counts what gets compiled: on a GPU while it happens, without one by asking Triton's cache keys.

The test process may run Triton's interpreter, so the work without a GPU happens in a process of its
own, where kernels stop short of compiling and launching.
"""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import fresh_process


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


def specializations(capability: tuple[int, int], runs: list[tuple]) -> list[list[str]]:
    """The kernels that a card of `capability` compiles for each run beyond those of earlier runs.

    A run has the arguments of `run_block` without the device, or those of `run_training` with
    "training" for a granularity. Needs no GPU.
    """
    return fresh_process.call(_specializations, capability, runs)


def _specializations(card: tuple[int, int], runs: list[tuple]) -> list[list[str]]:
    os.environ.pop("TRITON_INTERPRET", None)
    import torch
    import triton
    from pretended_card import pretended
    from wan_kernels import run_block, run_training

    torch.set_num_threads(1)
    known, results = set(), []

    def note(*, fn, key, **_):
        """Stops Triton before it compiles."""
        name = fn.name.rpartition(".")[2]
        if (name, str(key)) not in known:
            known.add((name, str(key)))
            results[-1].append(name)
        return True

    triton.knobs.runtime.jit_cache_hook = note
    with pretended(card):
        for length, topk, granularity, *low_bit in runs:
            results.append([])
            if granularity == "training":
                run_training(length, topk, "cpu")
            else:
                run_block(length, topk, granularity, "cpu", *low_bit)
    return results
