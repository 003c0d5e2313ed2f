"""Compiles the pack's kernels for a card as the host code launches them, without a GPU.

The test process runs Triton's interpreter, so the work happens in a process of its own, which
pretends the card.
"""

import contextlib
import os
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import fresh_process

ROOT = Path(__file__).resolve().parents[2]

# Shared memory one block may use, in bytes (CUDA programming guide, technical specifications).
SHARED_LIMIT = {
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (12, 0): 101376,
}
CARDS = tuple(SHARED_LIMIT)
ADA, HOPPER = (8, 9), (9, 0)
GRANULARITIES = "rows", "blocks"

# Runtime sizes compile nothing (test_compilations.py), so any length does; this one is cheap.
LENGTH = 2048
# Head dim, rows of query and key blocks: the default, and others where memory is tightest and on
# Hopper.
TILE = 128, 128, 64
TILES = ((64, 128, 64), (128, 64, 64), (128, 64, 128))
TILE_CARDS = HOPPER, (12, 0)

MACHINE_PRODUCT = re.compile(r"\b[A-Z]+MMA\.[\w.]+")
TO_FP8 = re.compile(r"\bcvt\.\w*\.satfinite\.e4m3x2\.\w+")
MATRIX_INSTRUCTION = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*")


class Compiled(NamedTuple):
    """One specialization of a kernel.

    `run` is the first of `runs` that launched it; `shared` counts bytes of a block, `registers` and
    `spilled` (bytes) are a thread's; `matrix` are the tensor core instructions in the PTX, `to_fp8`
    its conversions to e4m3. `by_triton` says why only Triton can launch it.
    """

    kernel: str
    run: str
    shared: int
    registers: int
    spilled: int
    matrix: list[str]
    to_fp8: list[str]
    by_triton: str | None


def compile_for(card: tuple[int, int]) -> list[Compiled]:
    """Every kernel that the host code launches on `card`."""
    return fresh_process.call(_compile_for, card)


def _compile_for(card: tuple[int, int]) -> list[Compiled]:
    """Makes all `runs`; gives what Triton compiled for them."""
    os.environ.pop("TRITON_INTERPRET", None)
    import torch
    import triton
    from pretended_card import pretended

    torch.set_num_threads(1)
    triton.knobs.compilation.disable_line_info = True  # sooner done, the same machine code
    found = {}
    for name, has_nvrtc, run in runs(card):
        with pretended(card, has_nvrtc), compiled_only() as kernels:
            run()
        for kernel in kernels:
            found.setdefault(kernel.hash, (name, kernel))
    return [measure(run, kernel) for run, kernel in found.values()]


def runs(card: tuple[int, int]) -> Iterator[tuple[str, bool, Callable[[], None]]]:
    """What is launched on a card: a name, whether NVRTC works there, and what to call."""
    import wan_kernels as wan

    for has_nvrtc in (False, True) if card == HOPPER else (False,):
        for low_bit in (True, False):
            for granularity in GRANULARITIES:
                for model in (wan.SMALL, wan.LARGE):
                    block = partial(wan.run_block, LENGTH, 0.1, granularity, "cpu", low_bit, model)
                    yield granularity, has_nvrtc, block
    for granularity in GRANULARITIES:
        for model in (wan.SMALL, wan.LARGE):
            yield granularity, False, partial(wan.run_apart, LENGTH, granularity, model)
    for model in (wan.SMALL, wan.LARGE):
        yield "shared", False, partial(wan.run_shared, LENGTH, model)
    for values in ("bf16", "fp16", "fp8") if card >= ADA else ("bf16", "fp16"):
        yield "attention", False, partial(wan.run_attention, LENGTH, values, *TILE, False)
        for tile in (TILE, *TILES) if card in TILE_CARDS else (TILE,):
            yield "attention", False, partial(wan.run_attention, LENGTH, values, *tile)
    if card[0] in (8, 12):
        for values in ("fp16", "fp8") if card >= ADA else ("fp16",):
            # Keys in int8, values beside them and apart; and where there are keys themselves.
            for tile, linear in ((TILE, True), (TILE, False), (TILES[0], True)):
                attend = partial(wan.run_attention, LENGTH, values, *tile, linear)
                yield "attention by CUDA", True, attend
    # Nothing is trained on blocks of 64 x 128, SageSLA's on Hopper.
    for tile in (TILE, *TILES[:2]) if card in TILE_CARDS else (TILE,):
        yield "training", False, partial(wan.run_training, LENGTH, 0.1, "cpu", *tile)
    yield "selection", False, partial(wan.run_selection, 2049)
    yield "vae", False, partial(wan.run_vae, "cpu")


@contextlib.contextmanager
def compiled_only() -> Iterator[list]:
    """Triton kernels that are launched get compiled only, into the list."""
    from triton.runtime.jit import JITFunction

    run, kernels = JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with mock.patch.object(JITFunction, "run", compile_only):
        yield kernels


def measure(run: str, kernel) -> Compiled:
    """The resources of a kernel that Triton compiled."""
    from turbodiffusion_pack.kernels.launching import why_triton

    used = resources(kernel.asm["cubin"])
    return Compiled(
        kernel=kernel.metadata.name,
        run=run,
        shared=kernel.metadata.shared,
        registers=used["registers"],
        spilled=used["stack"] + used["local"],
        matrix=sorted(set(MATRIX_INSTRUCTION.findall(kernel.asm["ptx"]))),
        to_fp8=sorted(set(TO_FP8.findall(kernel.asm["ptx"]))),
        by_triton=why_triton(kernel),
    )


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, bytes of stack and of local memory of a thread, and of shared memory of a block
    beside what a launch adds, as the cubin declares them.

    Triton's wheel brings the tool, for cubins of NVRTC as well, whose own log is for people.
    """
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    report = _read_by([tool, "--dump-resource-usage"], cubin)
    found = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", report)}
    names = {"registers": "REG", "stack": "STACK", "local": "LOCAL", "shared": "SHARED"}
    return {name: found[key] for name, key in names.items()}


def machine_products(target: str, *cubins: bytes) -> set[str]:
    """The tensor core instructions of cubins for `target` (as sm_90a), as QMMA.16832.F16.E4M3.E4M3
    of an fp8 product with fp16 sums; what is only emulated has others than its PTX."""
    return set(MACHINE_PRODUCT.findall(machine_code(target, *cubins)))


def machine_code(target: str, *cubins: bytes) -> str:
    """The instructions of cubins for `target` as text.

    All are read as one, as nvdisasm takes longer to start than to read one.
    """
    import triton

    # Nothing here follows jumps, so it need not either.
    options = ["--no-dataflow", "--binary", target.replace("sm_", "SM")]
    return _read_by([triton.knobs.nvidia.nvdisasm.path, *options], b"".join(map(_code, cubins)))


def _code(cubin: bytes) -> bytes:
    """The executable sections of an ELF file of 64 bits."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    code = b""
    for start in range(headers, headers + size * count, size):
        flags, _, offset, length = struct.unpack_from("<QQQQ", cubin, start + 8)
        executable = 4
        if flags & executable:
            code += cubin[offset : offset + length]
    return code


def _read_by(command: list[str], cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run(
            [*command, str(path)], check=True, capture_output=True, text=True
        ).stdout
