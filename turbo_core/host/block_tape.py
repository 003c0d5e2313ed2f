"""The fused block from a tape: Python decides once for all blocks and steps of a kind.

What it decides on hangs on the layouts of the tensors that the block's kernels read and on the
numbers of `_kind`: where one is another, the block is of another kind. Where the host may move a
weight meanwhile, or attention is not this pack's, nothing is recorded.
"""

import functools
import logging
from collections.abc import Callable, Iterator

import comfy.ops
import torch

from ...kernels.checks import Remembered, layouts
from ...kernels.dispatch import capability, cuda_unavailable
from ...kernels.tape import Tape, UnrecordedError, recording
from .. import run_report
from ..sla_settings import SLASettings
from .cross_attention import attends_itself, keys_values_of
from .int8_tensor import is_int8, unpack
from .options import SPLIT
from .self_attention import choose, note_sla, rotation_of
from .text import KeysValues
from .weights import float32_weights, resident

log = logging.getLogger(__name__)

# Recordings of a kind that may come to nothing: kernels are compiled at their first launches.
ATTEMPTS = 4
OLDEST = (8, 0)  # the compute capability that kernels need


class _Tapes(Remembered):
    """By kind: a tape, or how many recordings came to nothing."""

    MOST = 64  # each video's size and prompt's length has its own; it takes 0.4 MB of RAM


_tapes = _Tapes()


def from_tape(
    compute: Callable, block, index: int, x, modulation, freqs, context, text, options: dict
) -> torch.Tensor:
    """compute(), the fused block `index` of x [B, L, C], or the same by what was recorded of it.

    `modulation`, `freqs`, `context` and `text` are what it takes of the pass.
    """
    linears, settings = _linears(block._modules), _settings(block, index, x, text, options)
    if settings is None or not all(map(functools.partial(_stays, x), linears)):
        return compute()
    if index not in text:
        cross_attn = block._modules["cross_attn"]
        granularity = block._modules["ffn"]._modules["0"].granularity
        keys_values_of(cross_attn, index, granularity, context, text, True, options)
    passing = x, *modulation, *rotation_of(freqs, options), *text[index]
    tensors = [*passing, *_weights(block, linears, x.device)]
    kind = _kind(block, linears, tensors, settings, text)
    tape = _tapes.get(kind, 0)
    if tape == ATTEMPTS:
        return compute()
    if not isinstance(tape, Tape):
        return _recorded(compute, kind, tape, tensors)
    comfy.ops.run_every_op()
    out = tape.run(tensors)
    if out is None:
        return compute()
    note_sla(block._modules["self_attn"], index, settings, x)
    for op in linears:
        run_report.note_int8(op.granularity, op)
    return out


def _recorded(compute: Callable, kind: tuple, attempts: int, tensors: list) -> torch.Tensor:
    with recording(tensors) as recorder:
        out = compute()
    try:
        _tapes.put(kind, recorder.tape(out))
    except UnrecordedError as why:
        _tapes.put(kind, attempts + 1)
        log.debug("TurboDiffusion: a block is not recorded: %s", why)
    return out


def _linears(parts: dict) -> list[torch.nn.Module]:
    """The layers that multiply in a block, but for the text's keys and values."""
    attn, cross_attn = parts["self_attn"]._modules, parts["cross_attn"]._modules
    ffn = parts["ffn"]._modules
    return [*(attn[n] for n in "qkvo"), cross_attn["q"], cross_attn["o"], ffn["0"], ffn["2"]]


def _settings(block, index: int, x, text: KeysValues, options: dict) -> SLASettings | None:
    """Those of a block's attention; None where other kernels than this pack's take part."""
    if capability(x.device) < OLDEST or SPLIT in options:
        return None
    settings, why_dense = choose(block._modules["self_attn"], index, options)
    if why_dense or settings.attention != "sagesla":
        return None
    return settings if attends_itself(block._modules["cross_attn"], text, options) else None


def _stays(x: torch.Tensor, op: torch.nn.Module) -> bool:
    """Whether the weight of a layer is INT8 and lies beside x as the layer multiplies."""
    own = resident(op, x.dtype, x.device)
    return own is not None and is_int8(own[0]) and "merged" not in op.__dict__


def _weights(block, linears: list, device: torch.device) -> Iterator[torch.Tensor | None]:
    """Those that the kernels of a block read, and biases."""
    for op in linears:
        yield from unpack(op._parameters["weight"])
        yield op._parameters["bias"]
    parts = block._modules
    attn, cross_attn = parts["self_attn"]._modules, parts["cross_attn"]._modules
    small = attn["norm_q"], attn["norm_k"], parts["norm3"], cross_attn["norm_q"]
    for op in (*small, attn["proj_l"]) if "proj_l" in attn else small:
        yield from float32_weights(op, device)


def _kind(block, linears: list, tensors: list, settings: SLASettings, text: KeysValues) -> tuple:
    """All that decides on the launches of a block."""
    attn, cross_attn = block._modules["self_attn"], block._modules["cross_attn"]
    numbers = block.eps, attn.eps, cross_attn.eps, attn.num_heads, text.repeats
    device = tensors[0].device
    card = capability(device), cuda_unavailable(device)
    return layouts(*tensors), settings, numbers, tuple(op.granularity for op in linears), card
