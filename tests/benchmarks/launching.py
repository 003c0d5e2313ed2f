"""Times what Python does to launch fused blocks, on any machine: their kernels are never run.

    COMFYUI_DIR=/path/ComfyUI python tests/benchmarks/launching.py

Anew and from a tape, in a sampler's run whose prompt is known, the feed-forward layers in three
parts as those of 1.3B-480P. Blocks of a small model take as many launches as those of a large one;
more of what they allocate comes together. Triton compiles theirs for Hopper, the driver is a
function of the C library that does nothing, and tensors lie on the CPU, so torch's own operations
cost what they cost there: only figures of one machine compare. They are CPU time of the thread that
launches, which what else runs there hardly changes. Linux only.
"""

import cProfile
import ctypes
import functools
import itertools
import os
import pstats
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))
os.environ.pop("TRITON_INTERPRET", None)
sys.argv = sys.argv[:1]

import pretended_card  # noqa: E402 - before all that asks for the card
import tiny_models  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from in_comfyui import comfy  # noqa: E402
from turbodiffusion_pack.kernels import nvrtc  # noqa: E402
from turbodiffusion_pack.turbo_core import activation_memory  # noqa: E402
from turbodiffusion_pack.turbo_core.host import block, block_tape  # noqa: E402
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model  # noqa: E402
from turbodiffusion_pack.turbo_core.host.options import (  # noqa: E402
    BLOCKS,
    MADE_ONCE,
    TEXT,
    THIS_PASS,
)
from turbodiffusion_pack.turbo_core.host.patch import patch_attention  # noqa: E402
from turbodiffusion_pack.turbo_core.host.text import KeysValues  # noqa: E402
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings  # noqa: E402

LAYERS, TOKENS, DIM, FFN = 4, 384, 256, 512
TEXT_TOKENS, PROMPT = 512, 120
RUNS = 120
SETTINGS = SLASettings("sagesla", 0.1)
MAPS = itertools.count()
NOTHING = ctypes.CDLL(None).labs  # of its first argument, the kernel, which is 0 here


def load_model():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model-quant.pth")
        torch.save(tiny_models.t2v_checkpoint(dim=DIM, ffn=FFN, layers=LAYERS), path)
        model = patch_attention(load_turbo_model(str(path)), SETTINGS)
        comfy.model_management.load_models_gpu([model])
    return model


def make_pass(model):
    """A function that runs all blocks on tensors in bfloat16, as a forward pass calls them."""
    wan = model.model.diffusion_model
    x, context = (torch.randn(1, n, DIM, dtype=torch.bfloat16) for n in (TOKENS, TEXT_TOKENS))
    e, freqs = torch.zeros(1, 1, 6, DIM), wan.rope_encode(6, 16, 16, dtype=x.dtype)
    text = KeysValues(repeats=TEXT_TOKENS - PROMPT + 1)

    def run():
        options = {THIS_PASS: (SETTINGS, -1), MADE_ONCE: {}, BLOCKS: wan.blocks}
        options[TEXT] = lambda: text
        for run_block in wan.blocks:
            run_block(x, e=e, freqs=freqs, context=context, transformer_options=options)

    return run


@functools.cache
def load_kernel(*_, **__) -> nvrtc.Kernel:
    return nvrtc.Kernel(ctypes.c_void_p(0), 0, 0)


def encode(tensor_map: ctypes.Array, *_) -> int:
    """A tensor map unlike all others."""
    tensor_map[0] = next(MAPS)
    return 0


def let_triton_load() -> None:
    """Triton compiles, and takes what it compiled for loaded."""
    active = triton.runtime.driver.active
    active.launcher_cls = lambda source, metadata: lambda *arguments: None
    active.utils = types.SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *_: (1, 0, 0, 0, 1024),
        unload_module=lambda module: None,
    )


def main() -> None:
    torch.set_num_threads(1)
    run = make_pass(load_model())
    library = types.SimpleNamespace(cuLaunchKernel=NOTHING, cuTensorMapEncodeTiled=encode)
    with (
        torch.inference_mode(),
        pretended_card.pretended((9, 0), has_nvrtc=True),
        pretended_card.launched_by(library, load_kernel),
        mock.patch.object(block, "tiles_of", lambda *_: None),  # a CPU has no multiprocessors
        mock.patch.object(activation_memory, "PART_BYTES", 3 * FFN * TOKENS // 3),
        mock.patch.object(activation_memory, "TEXT_ACTIVATIONS", 0),
    ):
        let_triton_load()
        for how, attempts in (("anew", 0), ("from a tape", block_tape.ATTEMPTS)):
            block_tape.ATTEMPTS = attempts
            sys.stdout.write(f"a block {how}: {measured(run)}\n")


def measured(run: Callable) -> str:
    """What launching a block of the pass `run()` takes, in words."""
    times = []
    for _ in range(RUNS + 3):
        start = time.thread_time()
        run()
        times.append(1e6 * (time.thread_time() - start) / LAYERS)
    with cProfile.Profile() as profile:
        run()
    calls = pstats.Stats(profile).total_calls / LAYERS
    middle = statistics.median(times[3:])
    return f"{min(times):.0f} us at best, {middle:.0f} in the median, {calls:.0f} calls"


if __name__ == "__main__":
    main()
