"""What TurboDoctor measures of a GPU: its ceilings, the shares that our kernels reach, and what a
forward pass should take then, an estimate."""

import logging
from collections.abc import Callable

import torch

from ..kernels import ceilings, dispatch
from ..kernels.ceilings import INT8, Ceilings, kernel_ms
from ..kernels.int8_linear import int8_linear
from ..kernels.int8_quant import quantize_rows
from ..kernels.sla import sla_from_projections
from ..kernels.sparse_attention import default_pv
from . import cards, forward_time
from .forward_time import MODELS, TOPK, Shape

# Moderate: 16384 tokens of a 14B model's width, and heads of a 1.3B model's 480p.
TOKENS, WIDTH = 16384, 5120
HEADS, LENGTH, HEAD_DIM = 12, 32760, 128
NEEDED = 3 * 2**30  # bytes of memory, which a model may hold

log = logging.getLogger(__name__)


class TorchRunsError(Exception):
    """Raised in place of running an op's torch reference, which has no speed worth telling."""


def speed_lines(device: torch.device) -> list[str]:
    """What `device` reaches at best and what our kernels reach of it, lines of TurboDoctor's text.

    Takes some seconds on a GPU, once its kernels are compiled.
    """
    if device.type != "cuda" or torch.version.hip:
        return ["Speed: not measured, as models run on no NVIDIA GPU"]
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + kept  # torch gives out again what it keeps
    if free < NEEDED:
        return [
            f"Speed: not measured, as {free / 2**30:.1f} GiB are free and {NEEDED / 2**30:.0f} are "
            "needed: unload the models first"
        ]
    try:
        with torch.inference_mode(), torch.cuda.device(device):
            return _measured_lines(device)
    except Exception as problem:  # what a compiler or a driver raises is what is asked for
        log.warning("TurboDiffusion: measuring the speed failed", exc_info=True)
        return [f"Speed: failed with {type(problem).__name__}, the log has all of it"]


def _measured_lines(device: torch.device) -> list[str]:
    best = ceilings.measure(device)
    lines = [f"Speed at best: {_rates(best.tops, best.copy_gbs)}"]
    if card := cards.named(torch.cuda.get_device_name(device)):
        lines.append(f"Published for the {card.name}: {_rates(card.tops, card.gbs)}")
    try:
        linear = linear_tops(device)
        attention = attention_tops(device)
    except TorchRunsError as problem:
        return [*lines, f"Speed of our kernels: none, as {problem}"]
    values = ceilings.value_tops(best.tops, default_pv(device))
    floor = 2 / (1 / best.tops[INT8] + 1 / values)
    return [
        *lines,
        f"Speed of int8_linear: {linear:.0f} TOPS, {linear / best.tops[INT8]:.0%} of mma.sync's",
        f"Speed of SageSLA: {attention:.0f} TOPS, {attention / floor:.0%}",
        f"A forward pass, estimated from these: {_passes(best, linear, attention)}",
    ]


def _rates(tops: dict[str, float], gbs: float) -> str:
    products = ", ".join(f"{name} {rate:.0f}" for name, rate in tops.items())
    return f"{products} TOPS, copies {gbs:.0f} GB/s"


def _passes(best: Ceilings, linear: float, attention: float) -> str:
    """Seconds by model."""
    found = []
    for model in MODELS:
        ms = forward_time.estimate_here(model, linear, attention, best.tops, best.copy_gbs)
        found += [] if ms is None else [f"{model} {ms / 1000:.2f} s"]
    return ", ".join(found)


def linear_tops(device: torch.device) -> float:
    """TOPS of our INT8 linear, per token and channel, on `device`.

    Raises:
        TorchRunsError: it has no kernel there.
    """
    normal = _normal(device)
    x, w = normal(1, TOKENS, WIDTH), normal(WIDTH, WIDTH)
    operands, out = (*quantize_rows(x), *quantize_rows(w)), torch.empty_like(x)
    return 2e-9 * TOKENS * WIDTH * WIDTH / _ms(lambda: int8_linear(*operands, out=out))


def attention_tops(device: torch.device) -> float:
    """TOPS of SageSLA from the projections to its output, counted on the selected blocks.

    Raises:
        TorchRunsError: it has no kernel there.
    """
    normal = _normal(device)
    q, k, v = (normal(1, LENGTH, HEADS, HEAD_DIM) for _ in range(3))
    norm, angles = normal(HEADS * HEAD_DIM), normal(1, LENGTH, HEAD_DIM // 2).float()
    proj = normal(HEAD_DIM, HEAD_DIM) / 16, normal(HEAD_DIM)
    tensors = q, k, v, (norm, norm), (angles.cos(), angles.sin()), proj
    ms = _ms(lambda: sla_from_projections(*tensors, topk=TOPK, low_bit=True))
    one_layer = Shape(HEADS * HEAD_DIM, 0, 1, 16, 832, 480)
    return forward_time.self_attention_operations(one_layer, TOPK) / 1e9 / ms


def _normal(device: torch.device) -> Callable[..., torch.Tensor]:
    """Makes random tensors, and leaves torch's own random numbers alone."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, device=device).bfloat16()


def _ms(run: Callable[[], object]) -> float:
    with dispatch.listening(_refuse_torch):
        run()
    return kernel_ms(run)


def _refuse_torch(op: str, name: str, why: str | None) -> None:
    if name == dispatch.REFERENCE:
        raise TorchRunsError(f"{op} runs in torch: {why}")
