"""What a stage will need, by formula, before anything starts: memory, disk, work, time.

All of it is an estimate. States and work follow from shapes; activations from what a Wan block
keeps; time from a rate that is assumed, or measured with one product on the device there is.
"""

import sys
import time
from dataclasses import dataclass

import torch

from ..checkpoint.sizes import FREQ_DIM, HEAD_DIM, OUT_CHANNELS, PATCH_SIZE, TEXT_DIM, wan_shapes
from .presets import SLA, Preset, settings_of
from .processes import count, rank
from .rcm import student_updates

# Bytes a parameter, by network: fp32 all of it.
LEARNER = {"weights": 4, "gradients": 4, "moments": 8, "average": 4}
STATES = {
    "teacher": {"student": LEARNER},
    "sla": {"student": LEARNER, "teacher": {"weights": 4}},
    "rcm": {"student": LEARNER, "fake score": {**LEARNER, "average": 0}, "teacher": {"weights": 4}},
}
ON_DISK = 3  # step checkpoints at a time: two are kept while the next is written

# Costs in units of a forward pass. A backward pass does the linears' products twice; attention has
# 2 products forward and 5 backward, the sparse one 7, as dq and dk, dv are separate kernels. The
# tangent runs in fp32 (TF32), at half the rate: counted twice.
BACKWARD = {"linear": 2.0, "dense": 2.5, "sparse": 3.5}
TANGENT = {"linear": 2 * 2.0, "dense": 2 * 3.0}

H100_RATE = 350e12  # FLOP/s that training of Wan may reach on one H100, assumed
FILLED = 0.95  # of a GPU's memory can be used
TOO_LONG = 365 * 86400  # seconds, beyond which nobody wants to know
UTILISATION = 0.4  # of the rate of one large product, for everything that is not one


@dataclass(frozen=True)
class Estimate:
    """Of one stage.

    Attributes:
        parameters: of the network, without what SLA adds (some thousand).
        states: bytes on each GPU, by network and part.
        activations: bytes on each GPU.
        checkpoint: bytes of one step checkpoint.
        steps, batch: as the preset has them.
        work: floating-point operations of the whole stage.
    """

    parameters: int
    states: dict[str, dict[str, float]]
    activations: float
    checkpoint: float
    steps: int
    batch: int
    work: float


def estimate(preset: Preset, stage: str, processes: int = 1) -> Estimate:
    """Memory, disk and work of a stage (teacher, sla or rcm) on so many GPUs."""
    settings = settings_of(preset, stage)
    parameters = sum(torch.Size(shape).numel() for shape in wan_shapes(preset.sizes).values())
    states = {
        network: {part: parameters * size / processes for part, size in parts.items() if size}
        for network, parts in STATES[stage].items()
    }
    saved = sum(
        size
        for network, parts in STATES[stage].items()
        for part, size in parts.items()
        if network != "teacher" and part != "gradients"
    )
    work = {"teacher": _teacher, "sla": _sla, "rcm": _rcm}[stage](preset)
    return Estimate(
        parameters=parameters,
        states=states,
        activations=_activations(preset, settings.micro_batch),
        checkpoint=parameters * saved,
        steps=settings.steps,
        batch=settings.batch,
        work=work * settings.batch,
    )


def show(name: str, preset: Preset, stage: str, device: torch.device) -> None:
    """Write the estimate of a stage to the terminal (stdout); nothing is started."""
    if rank() == 0:
        sys.stdout.write(described(name, preset, stage, device) + "\n")


def described(name: str, preset: Preset, stage: str, device: torch.device) -> str:
    """The estimate as lines of text, with the time on this device."""
    found, each = estimate(preset, stage, count()), f"on each {device.type.upper()}"
    lines = {
        "estimate": f"{stage} of preset {name}, {count()} x {device.type.upper()}; nothing is "
        "started",
        "parameters": f"{found.parameters / 1e6:,.1f} million",
        "memory": f"{_bytes(_memory(found))} {each}{_room(device)}: {_by_part(found)}",
        "fits": f"{enough_gpus(preset, stage) or 'no number of'} GPUs of 80 GB",
        "disk": f"{_bytes(ON_DISK * found.checkpoint)} for {ON_DISK} step checkpoints",
        "steps": f"{found.steps}, {found.batch} samples each",
        "work": f"{_flops(found.work / found.steps / found.batch)} a sample and step, "
        f"{_flops(found.work)} in all",
        "time here": _time_here(found.work, device),
        "on H100s": f"{_duration(found.work / H100_RATE)} of one GPU that reaches "
        f"{H100_RATE / 1e12:.0f} TFLOP/s",
        "note": preset.note,
    }
    return "\n".join(f"{key:<11} {value}" for key, value in lines.items() if value)


def forward_work(preset: Preset, sla: SLA | None = None) -> dict[str, float]:
    """Floating-point operations of one sample's forward pass, by kind of product.

    Returns:
        {"linear": ..., "dense": ..., "sparse": ...}; "sparse" is 0 without `sla`.
    """
    sizes, tokens, text = preset.sizes, preset.tokens, preset.context
    dim, layers = sizes.dim, sizes.num_layers
    rows = 2 * tokens * dim  # a product of all tokens with one column
    block = rows * (6 * dim + 2 * sizes.ffn_dim) + 2 * text * dim * 2 * dim
    ends = rows * PATCH_SIZE * (sizes.in_channels + OUT_CHANNELS)
    embeddings = 2 * dim * (text * (TEXT_DIM + dim) + FREQ_DIM + 7 * dim)
    cross, whole = 2 * rows * text, 2 * rows * tokens
    work = {"linear": layers * block + ends + embeddings, "dense": layers * cross, "sparse": 0.0}
    if sla is None:
        return {**work, "dense": layers * (cross + whole)}
    blocks = -(-tokens // sla.block_k)
    share = max(1, int(sla.topk * blocks)) / blocks
    branch = 3 * rows * HEAD_DIM  # phi(k)^T v, phi(q) H and the projection
    return {
        "linear": work["linear"] + layers * branch,
        "dense": work["dense"],
        "sparse": layers * share * whole,
    }


def _trained(preset: Preset, sla: SLA | None = None) -> float:
    """One sample's forward and backward pass."""
    again = 1 + preset.checkpointing
    work = forward_work(preset, sla)
    return sum(flops * (again + BACKWARD[kind]) for kind, flops in work.items())


def _forward(preset: Preset, factors: dict[str, float] | None = None) -> float:
    work = forward_work(preset)
    return sum(flops * (factors or {}).get(kind, 1.0) for kind, flops in work.items())


def _teacher(preset: Preset) -> float:
    return preset.teacher.steps * _trained(preset)


def _sla(preset: Preset) -> float:
    points = preset.rcm.rollout if preset.sla.after_rcm else 1
    return preset.sla.steps * points * (_forward(preset) + _trained(preset, preset.sla))


def _rcm(preset: Preset) -> float:
    """The student's iterations and the fake score's, which each sample the student first."""
    settings = preset.rcm
    forward, trained = _forward(preset), _trained(preset)
    mean_rollout = (1 + settings.rollout) / 2
    consistency = 2 * forward + _forward(preset, TANGENT) + trained
    dmd = (mean_rollout - 1) * forward + trained + 3 * forward
    fake = mean_rollout * forward + trained
    student = student_updates(settings.steps, settings)
    both = max(0, student - settings.consistency_only)
    return student * consistency + both * dmd + (settings.steps - student) * fake


def _activations(preset: Preset, samples: int) -> float:
    """Bytes that one backward pass has to keep: a block's input in fp32, and what is inside one
    block, or in all of them without checkpointing: some 12 tensors in bf16 and 6 in fp32 as wide as
    the model, 3 in bf16 as wide as the feed-forward layer."""
    rows, sizes = samples * preset.tokens, preset.sizes
    inputs = 4 * rows * sizes.dim * sizes.num_layers
    inside = rows * (48 * sizes.dim + 6 * sizes.ffn_dim)
    return inputs + inside * (1 if preset.checkpointing else sizes.num_layers)


def measured_rate(device: torch.device) -> float:
    """FLOP/s of one large product here, in bf16 on a GPU and fp32 on a CPU; takes some 0.1 s."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    x = torch.ones(size, size, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for it
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _time_here(work: float, device: torch.device) -> str:
    seconds = work / (measured_rate(device) * UTILISATION * count())
    if seconds > TOO_LONG:
        return "over a year, this is no machine for it"
    return (
        f"{_duration(seconds)} at {UTILISATION:.0%} of the rate of one large product; small "
        "networks take longer"
    )


def _memory(found: Estimate) -> float:
    return sum(sum(parts.values()) for parts in found.states.values()) + found.activations


def _by_part(found: Estimate) -> str:
    told = []
    for network, parts in found.states.items():
        each = ", ".join(f"{part} {_bytes(size)}" for part, size in parts.items())
        told.append(f"{network} {_bytes(sum(parts.values()))} ({each})")
    return ", ".join([*told, f"activations {_bytes(found.activations)}"])


def enough_gpus(preset: Preset, stage: str, size: float = 80e9) -> int:
    """GPUs of `size` bytes that the stage fits on, its slots dealt evenly and its states split by
    FSDP2; 0 if no number of them is enough."""
    settings, found = settings_of(preset, stage), estimate(preset, stage)
    room = FILLED * size - found.activations
    states = _memory(found) - found.activations
    slots = settings.batch // settings.micro_batch
    return next((n for n in range(1, slots + 1) if slots % n == 0 and states / n <= room), 0)


def _room(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, _ = torch.cuda.mem_get_info(device)
    return f" (this one has {_bytes(free)} free)"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.3g} MB"


def _flops(work: float) -> str:
    for unit, size in (("ZFLOP", 1e21), ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if work >= size:
            return f"{work / size:,.3g} {unit}"
    return f"{work / 1e9:,.3g} GFLOP"


def _duration(seconds: float) -> str:
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds > 2 * length:
            return f"about {seconds / length:,.0f} {unit}"
    return f"about {seconds:,.0f} seconds" if seconds >= 1 else "a moment"
