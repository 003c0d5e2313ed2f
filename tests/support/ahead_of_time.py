"""Compiles the pack's Triton kernels for every supported card, without a GPU.

The test process runs Triton's interpreter, so the work happens in worker processes of its own;
they print one JSON line per compiled kernel.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parent.parent
WORKERS = 2

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

MATRIX_INSTRUCTION = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*")


class Variant(NamedTuple):
    """One specialisation of a kernel, as a launch would make it.

    `signature` maps every parameter that is not a constexpr to its Triton type; a ":16" behind
    the type says that the pointer or the integer is divisible by 16. `label` tells variants of
    one kernel apart. `spills` is how many bytes a thread may spill, 0 but for a measured reason.
    `registers` is the most a thread gets, None for what the compiler takes.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    capabilities: tuple[tuple[int, int], ...] = CARDS
    label: str = ""
    spills: int = 0
    registers: int | None = None


class Job(NamedTuple):
    """One variant on one card."""

    variant: Variant
    capability: tuple[int, int]

    @property
    def name(self) -> str:
        major, minor = self.capability
        label = f"-{self.variant.label}" if self.variant.label else ""
        return f"{self.variant.kernel.__name__}{label}-sm_{major}{minor}"


def variants_of(kernel, signature, constexprs, config, label="", capabilities=CARDS):
    """`kernel` with the launch configuration, `config(capability)`, that ships for each card."""
    variants = []
    for capability in capabilities:
        launch = dict(config(capability))
        warps, stages = launch.pop("num_warps"), launch.pop("num_stages")
        registers = launch.pop("maxnreg", None)
        constants = {**constexprs, **launch}
        variant = Variant(kernel, signature, constants, warps, stages, (capability,), label)
        variants.append(variant._replace(registers=registers))
    return variants


def jobs() -> list[Job]:
    """Everything there is to compile."""
    from ahead_of_time_variants import OPS

    every = [v for op in OPS for v in op()]
    return [Job(v, capability) for v in every for capability in v.capabilities]


def compile_all() -> dict[str, dict]:
    """Compile every job in worker processes.

    Returns:
        By job name: `shared` (bytes), `registers`, `stack` and `local` (bytes a thread spills),
        `matrix` (the tensor core instructions in the PTX).
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "import ahead_of_time as a; a.work()"]
    workers = [
        subprocess.Popen(
            [*command, str(index)],
            cwd=SUPPORT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(WORKERS)
    ]
    results = {}
    for worker in workers:
        out, error = worker.communicate()
        if worker.returncode:
            raise RuntimeError(f"a kernel does not compile:\n{error[-8000:]}")
        results.update((r["name"], r) for r in map(json.loads, out.splitlines()))
    return results


def work():
    """Body of a worker: compile every WORKERS-th job and write the results to stdout."""
    import pack  # noqa: F401

    for job in jobs()[int(sys.argv[1]) :: WORKERS]:
        sys.stderr.write(f"{job.name}\n")
        sys.stdout.write(json.dumps(build(job)) + "\n")


def build(job: Job) -> dict:
    """Compile one job and read its resources."""
    import triton
    from triton.backends.compiler import GPUTarget

    major, minor = job.capability
    compiled = triton.compile(
        source(job.variant),
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options={
            "num_warps": job.variant.num_warps,
            "num_stages": job.variant.num_stages,
            "maxnreg": job.variant.registers,
        },
    )
    return {
        "name": job.name,
        "shared": compiled.metadata.shared,
        "matrix": sorted(set(MATRIX_INSTRUCTION.findall(compiled.asm["ptx"]))),
        **resources(compiled.asm["cubin"]),
    }


def source(variant: Variant):
    """The variant as Triton's compiler takes it, its arguments in the kernel's order."""
    from triton.compiler import ASTSource

    types_ = {**variant.signature, **dict.fromkeys(variant.constexprs, "constexpr")}
    names = variant.kernel.arg_names
    if sorted(names) != sorted(types_):
        wrong = sorted(set(names) ^ set(types_))
        raise ValueError(f"{variant.kernel.__name__}: the variant gets parameters wrong: {wrong}")
    aligned = [i for i, name in enumerate(names) if types_[name].endswith(":16")]
    return ASTSource(
        fn=variant.kernel,
        signature={name: types_[name].removesuffix(":16") for name in names},
        constexprs=variant.constexprs,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes per thread, as the cubin declares them."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        report = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    numbers = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    return {"registers": numbers["REG"], "stack": numbers["STACK"], "local": numbers["LOCAL"]}
