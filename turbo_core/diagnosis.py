"""What TurboDoctor says: this machine, its versions, and which kernel each op uses here and why.

Made to be pasted into a bug report: no paths, no names of people or machines, no environment.
"""

import collections
import contextlib
import itertools
import logging
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch

from ..kernels import dispatch
from ..kernels.int8_linear import int8_linear
from ..kernels.int8_quant import quantize_blocks, quantize_rows
from ..kernels.norm import rms_norm
from ..kernels.norm_quant import layer_norm_quant
from ..kernels.requantize import requantize_rows
from ..kernels.rope import apply_rope
from ..kernels.sla import sla, sla_from_projections
from ..kernels.sparse_attention import default_pv
from .speed import speed_lines

ROOT = Path(__file__).resolve().parents[1]

# Cards whose speed and outputs were measured, and architectures whose kernels were compiled
# ahead of time and checked for shared memory and spills.
MEASURED = ("H100",)
COMPILED = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))

# What a line of ops begins with, by what they run in.
FASTEST = {dispatch.CUDA: "CUDA kernels", dispatch.TRITON: "Triton kernels"}
SLOWER = {
    dispatch.TRITON: "Triton kernels, where CUDA is faster",
    dispatch.REFERENCE: "Torch reference, slow",
}

Choice = tuple[str, str, str | None]  # op, what it runs in, why not in what is faster

# How far a kernel may be from its reference. In low bits weights are rounded against another
# maximum and, in CUDA C++, keys around another center: played on a CPU 1.3e-2 and, both, 2.03e-2.
TRIAL_BOUND, LOW_BIT_BOUND = 2e-2, 3e-2

GIB = 2**30

# What an error message may tell of its user: the folder after these.
HOMES = re.compile(r"([\\/](?:home|Users)[\\/])[^\\/\n:()'\"]+")

log = logging.getLogger(__name__)


def report(device: torch.device | None = None, comfyui: str | None = None) -> str:
    """The whole text, lines of ASCII.

    Args:
        device: where models run; the first GPU, or the CPU without one, if None.
        comfyui: what the running ComfyUI says of itself, None outside of it.
    """
    device = device or torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    runs = trials(device)
    choices = heard(runs)
    lines = [
        f"TurboDiffusion for Wan {pack_version()}",
        comfyui or _comfyui_at_rest(),
        f"Python {platform.python_version()}, {_system()}",
        f"torch {torch.__version__}, {_toolkit()}, {_triton()}",
        *_device_lines(device),
        *kernel_lines(choices),
        f"SageSLA here: int8 QK and {default_pv(device)} PV",
        *_trial_lines(runs, choices),
        *speed_lines(device),
        *(f"To do: {advice}" for advice in _advice()),
    ]
    return HOMES.sub(r"\1...", "\n".join(lines))


def pack_version() -> str:
    """Version of this pack, as its pyproject.toml has it."""
    return _version_in(ROOT / "pyproject.toml", "version")


def comfyui_version(folder: Path) -> str:
    """Version of the ComfyUI in `folder`, "of unknown version" where there is none."""
    return _version_in(folder / "comfyui_version.py", "__version__")


def card_state(name: str, card: tuple[int, int]) -> str:
    """Whether the GPU `name` of compute capability `card` was measured, else what is known."""
    if any(measured in name for measured in MEASURED):
        return "measured"
    if card < (8, 0):
        return "too old for the kernels, which need sm_80 or newer"
    if card in COMPILED:
        return "untested: the kernels were compiled for it ahead of time, never run on it"
    return "untested"


def trials(
    device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Callable[[str], torch.Tensor]]:
    """Small runs of all the ops that a model is made of, by name; called with a backend."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, weight, norm = normal(1, 256, 256), normal(256, 256), normal(256)
    q, k, v = (normal(1, 256, 2, 128) for _ in range(3))
    rotation = tuple(normal(1, 256, 64, dtype=torch.float32) for _ in range(2))
    proj = normal(128, 128) / 16, normal(128) / 16

    def feed_forward(backend):
        """A LayerNorm and two INT8 linears, as a block of the model has them."""
        options = {"backend": backend}
        w = requantize_rows(*quantize_blocks(weight, **options), **options)
        y = int8_linear(*layer_norm_quant(x, "rows", **options), *w, out_dtype=dtype, **options)
        h = quantize_rows(y, "gelu_tanh", **options)
        return int8_linear(*h, *w, residual=x, out_dtype=dtype, **options)

    def sagesla(backend):
        tensors = q.clone(), k.clone(), v, (norm, norm), rotation, proj
        return sla_from_projections(*tensors, topk=1.0, low_bit=True, backend=backend)

    # Every key block is selected: a near tie, decided otherwise, would look like an error.
    return {
        "rms_norm": lambda backend: rms_norm(x, norm, backend=backend),
        "apply_rope": lambda backend: apply_rope(q, *rotation, backend=backend),
        "int8_linear": feed_forward,
        "sla": lambda backend: sla(q, k, v, proj, topk=1.0, backend=backend),
        "sagesla": sagesla,
    }


def heard(runs: dict[str, Callable[[str], torch.Tensor]]) -> set[Choice]:
    """What `dispatch.choose` tells while these run as a model would run them."""
    choices = set()
    with dispatch.listening(lambda *choice: choices.add(choice)):
        for run in runs.values():
            with contextlib.suppress(Exception):  # the trial of it tells
                run("auto")
    return choices


def kernel_lines(choices: set[Choice]) -> list[str]:
    """Which implementation each op uses, and why where that is not the fastest."""
    ops = collections.defaultdict(set)
    for op, name, why in choices:
        ops[name, why or ""].add(op)
    lines = []
    for name, why in sorted(ops):
        heading = SLOWER[name] if why else FASTEST[name]
        lines.append(f"{heading}: {', '.join(sorted(ops[name, why]))}")
        lines += [f"Why: {why}"] if why else []
    return lines


def trial_line(name: str, run: Callable[[str], torch.Tensor]) -> str:
    """How far `run("triton")` is from `run("reference")`, or what kept it from running."""
    try:
        out, expected = run("triton").float(), run("reference").float()
        error = ((out - expected).norm() / expected.norm()).item()
    except Exception as problem:  # what a compiler or a driver raises is what is asked for
        log.warning("TurboDiffusion: the trial of %s failed", name, exc_info=True)
        return f"Trial of {name}: failed with {type(problem).__name__}, the log has all of it"
    bound = LOW_BIT_BOUND if name == "sagesla" else TRIAL_BOUND
    state = "ok" if error <= bound else "WRONG"
    return f"Trial of {name}: {state}, {error:.1e} from the torch reference"


def _comfyui_at_rest() -> str:
    """What can be known about ComfyUI without running in it."""
    if ROOT.parent.name != "custom_nodes":
        return "ComfyUI: none here (the TurboDoctor node tells more)"
    version = comfyui_version(ROOT.parents[1])
    return f"ComfyUI {version}, not running (the TurboDoctor node tells more)"


def _version_in(file: Path, name: str) -> str:
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(rf'^{name} = "([^"]+)"', text, re.MULTILINE)
    return found[1] if found else "of unknown version"


def _system() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _toolkit() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA in it"


def _triton() -> str:
    if not dispatch.has_triton():
        return dispatch.triton_unavailable(torch.device("cpu"))
    return f"Triton {dispatch.triton.__version__}"


def _device_lines(device: torch.device) -> list[str]:
    """Each GPU with its memory and whether it was measured; the one that models run on."""
    count = torch.cuda.device_count()
    lines = [_gpu_line(i) for i in range(count)] or ["GPU: none that torch can use"]
    lines += [_peer_line(count)] if count > 1 else []
    if device.type != "cuda":
        return [*lines, f"Models run on: {device}"]
    free = torch.cuda.mem_get_info(device)[0] / GIB
    return [*lines, f"Models run on: {device}, {free:.1f} GiB free"]


def _gpu_line(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    card = properties.major, properties.minor
    memory = f"{properties.total_memory / GIB:.1f} GiB"
    architecture = "" if torch.version.hip else f", sm_{card[0]}{card[1]}"
    state = card_state(properties.name, card)
    return f"GPU {index}: {properties.name}{architecture}, {memory}, {state}"


def _peer_line(count: int) -> str:
    """Which pairs of GPUs reach each other's memory without going through the host's."""
    pairs = list(itertools.combinations(range(count), 2))
    reach = torch.cuda.can_device_access_peer
    found = [f"{a}-{b}" for a, b in pairs if reach(a, b) and reach(b, a)]
    told = "every pair" if len(found) == len(pairs) else ", ".join(found) or "none"
    return f"Peer access between GPUs: {told}"


def _trial_lines(runs: dict[str, Callable[[str], torch.Tensor]], choices: set[Choice]) -> list[str]:
    if all(name == dispatch.REFERENCE for _, name, _ in choices):
        return ["Trial: none, as no Triton kernel runs here"]
    return [trial_line(name, run) for name, run in runs.items()]


def _advice() -> list[str]:
    """What a user can do about the slow path."""
    advice = []
    if not dispatch.has_triton():
        package = "triton-windows" if platform.system() == "Windows" else "triton"
        advice.append(f"install Triton 3.4 or newer in ComfyUI's Python: pip install -U {package}")
    if not torch.version.cuda and not torch.version.hip:
        advice.append("this torch cannot use NVIDIA GPUs: install one that is built with CUDA")
    return advice
