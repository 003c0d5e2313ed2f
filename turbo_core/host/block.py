"""The fused transformer block: Wan's block in INT8, every activation quantized once.

Stands in for WanAttentionBlock.forward of ComfyUI's model, and steps aside for it, with the reason
in the run's log line, wherever it could not honour what is there.
"""

import functools
from collections.abc import Iterator, Sequence

import comfy.model_management
import torch
from comfy.ldm.wan.model import WanAttentionBlock, WanT2VCrossAttention

from ...kernels.checks import HEAD_DIMS
from ...kernels.int8_linear import int8_linear, int8_linear_and_squares, tiles_of
from ...kernels.norm import rms_norm
from ...kernels.norm_quant import layer_norm_quant
from ...kernels.room import in_whole_blocks
from .. import run_report
from ..activation_memory import HIDDEN_BYTES, TEXT_BYTES, part_lengths, soonest, text_bytes
from ..parallel.shares import in_blocks
from . import per_run
from .block_tape import from_tape
from .cross_attention import attend_to_text, attends_itself, keys_values_of
from .epilogue import quantize
from .gradients import GRADIENTS, records_graph
from .int8_tensor import is_int8
from .once import once
from .operations import Linear, int8_product, int8_weights, of_channels, small_int8_weights
from .options import BLOCKS, SPLIT, TEXT
from .patch_owner import is_hooked, is_ours, is_stock
from .prefetch import next_block
from .self_attention import attend, host_attention, missing_parts
from .split_block import split_attend
from .text import KeysValues
from .versions import unrecorded
from .weights import float32_weights


# torch.compile traces the host's part only. Of ours it would freeze decisions made from options,
# whose guards newer hosts drop, and round otherwise than the kernels do.
@torch.compiler.disable(recursive=False)
def block_forward(block, index, x, e, freqs, context, transformer_options=None, **others):
    """WanAttentionBlock.forward of block `index`: x [B, L, C] with modulation e [B, (1,) 6, C].

    `freqs` is the host's rotation [1, L, 1, D/2, 2, 2], `context` the text features [B, T, C];
    `others` are what only the host's own forward takes.
    """
    transformer_options = transformer_options or {}
    y = _unless_it_steps_aside(block, index, x, e, freqs, context, transformer_options)
    if y is not None:
        return y
    others["transformer_options"] = transformer_options
    return type(block).forward(block, x, e=e, freqs=freqs, context=context, **others)


@torch.compiler.disable
def _unless_it_steps_aside(
    block, index, x, e, freqs, context, transformer_options
) -> torch.Tensor | None:
    """The block run fused, or None where the host's forward has to; either way told the report."""
    next_block(transformer_options, block, x.device)
    recorded = records_graph(block, x, e, context)
    reason = GRADIENTS if recorded else why_not_fused(block, e, transformer_options)
    if reason is not None:
        run_report.note_unfused(index, reason)
        return None
    run_report.note_fused(index)
    with unrecorded():
        return _fused(block, index, x, e, freqs, context, transformer_options)


def _fused(block, index, x, e, freqs, context, transformer_options):
    text = transformer_options.get(TEXT, KeysValues)()
    modulation = _modulation(block, e, x.device, transformer_options)

    def compute():
        return _computed(block, index, x, modulation, freqs, context, text, transformer_options)

    taken = x, modulation, freqs, context, text, transformer_options
    return from_tape(compute, block, index, *taken)


def _computed(block, index, x, modulation, freqs, context, text: KeysValues, transformer_options):
    # Not as attributes: those of a module take ten times as long to find, and this is every block.
    parts = block._modules
    attn, ffn = parts["self_attn"], parts["ffn"]._modules
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation
    granularity, eps, dtype = ffn["0"].granularity, block.eps, x.dtype
    split = transformer_options.get(SPLIT)
    x = x if split is None else split.tokens_into(index, x)
    x = x.contiguous()  # the first block gets the patch embedding channels first; then no copy
    small = {} if split else small_int8_weights(_square_linears(parts), dtype, x.device)

    def project(op, n, out=None, **others):
        if out is not None and 2 * out.shape[2] == op.out_features:
            return _in_halves(op, n, out)
        if op in small:
            squares = others.pop("squares", False)
            multiply = int8_linear_and_squares if squares else int8_linear
            return multiply(*n, *small.pop(op), dtype, out=out, **others)
        return int8_product(op, n, dtype, out=out, **others)  # [B, L, C]

    def normed():
        return layer_norm_quant(x, granularity, scale=scale1, shift=shift1, eps=eps)

    if split is None:
        y = attend(attn, index, x, normed, project, freqs, transformer_options)
        y = quantize(y, granularity)
    else:
        y = split_attend(attn, index, x, normed, granularity, freqs, transformer_options)
    out = in_whole_blocks(*x.shape, dtype, x.device)
    x = project(attn._modules["o"], y, out, gate=gate1, residual=x)
    del y, out

    _add_text(parts, index, x, eps, granularity, text, context, small, transformer_options)
    small.clear()  # what is left of them is room for the feed-forward layers

    up, down = int8_weights(ffn["0"], dtype, x.device), None
    n = layer_norm_quant(x, granularity, scale=scale2, shift=shift2, eps=eps)
    lengths = part_lengths(*x.shape[:2], HIDDEN_BYTES * ffn["0"].out_features)
    for tokens in _parts_of(x, lengths, granularity, ffn["0"], ffn["2"]):
        part = x[:, tokens]
        h = int8_linear(*_of_tokens(*n, tokens), *up, dtype)
        # Not before: where it is streamed, it comes while the GPU is at the first product.
        down = down or int8_weights(ffn["2"], dtype, x.device)
        h = quantize(h, granularity, activation="gelu_tanh")
        int8_linear(*h, *down, dtype, gate=gate2, residual=part, out=part)
        del h
    return x


def _add_text(
    parts, index, x, eps, granularity, text: KeysValues, context, small: dict, transformer_options
):
    """Add to x [B, L, C], in place, what its tokens find in the text features `context`."""
    cross_attn, dtype = parts["cross_attn"], x.dtype
    linears = cross_attn._modules
    norm, norm_q = (float32_weights(op, x.device) for op in (parts["norm3"], linears["norm_q"]))
    itself = attends_itself(cross_attn, text, transformer_options)
    answering = small.pop(linears["o"], None)
    asking = small.pop(linears["q"], None) or int8_weights(linears["q"], dtype, x.device)
    k, v = keys_values_of(
        cross_attn, index, granularity, context, text, itself, transformer_options
    )
    n = layer_norm_quant(x, granularity, weight=norm[0], bias=norm[1], eps=eps)
    multiply = int8_linear_and_squares if itself else int8_linear
    lengths = part_lengths(*x.shape[:2], TEXT_BYTES * x.shape[2], text_bytes(*x.shape))
    for tokens in _parts_of(x, lengths, granularity, linears["q"], linears["o"]):
        part = x[:, tokens]
        q = torch.empty_like(part)
        product = multiply(*_of_tokens(*n, tokens), *asking, dtype, out=q)
        squares = product[1] if itself else None
        del product
        if squares is None:
            q = rms_norm(q, norm_q[0], cross_attn.eps)
        if itself:
            y = attend_to_text(cross_attn, q, squares, k, v, text.repeats)
        else:
            y = host_attention(cross_attn, q, k, v, transformer_options)
        del q
        answering = answering or int8_weights(linears["o"], dtype, x.device)
        int8_linear(*quantize(y, granularity), *answering, dtype, residual=part, out=part)
        del y


def _parts_of(
    x: torch.Tensor, lengths: range, granularity: str, *linears: torch.nn.Module
) -> Sequence[slice]:
    """Parts of the tokens of x [B, L, C], of that of `lengths` which goes through the `linears`
    soonest."""
    batch, length, _ = x.shape
    if lengths[0] >= length:
        return (slice(0, length),)
    at_once, tiles = lengths[0], tiles_of(x.device, granularity)
    if tiles is not None:
        shapes = tuple((op.out_features, op.in_features) for op in linears)
        at_once = soonest(lengths, batch, length, shapes, tiles)
    return [slice(i, min(i + at_once, length)) for i in range(0, length, at_once)]


def _of_tokens(
    x_q: torch.Tensor, x_scale: torch.Tensor, tokens: slice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some tokens, from a whole block on, of x_q [B, L, C] and its scales [B, L] or
    [B, ceil(L / 128), ceil(C / 128)]."""
    return x_q[:, tokens], x_scale[:, in_blocks(tokens) if x_scale.ndim == 3 else tokens]


def _in_halves(op, n, out: torch.Tensor) -> Iterator[torch.Tensor]:
    """The op's output from quantized n, half of its channels and then the others, both in `out`."""
    weights, half = int8_weights(op, out.dtype, out.device), op.out_features // 2
    for channels in (slice(0, half), slice(half, op.out_features)):
        yield int8_linear(*n, *of_channels(*weights, channels), out.dtype, out=out)


def _modulation(block, e, device, transformer_options: dict) -> tuple[torch.Tensor, ...]:
    """Shift, scale and gate of both halves, float32 [B, 1, C] each."""
    blocks = transformer_options.get(BLOCKS, ())
    e, of_all = once(transformer_options, "modulation", e, lambda e: _modulations(blocks, e))
    if block in of_all:
        return of_all[block]
    own = block._parameters["modulation"]
    if own.device != device or own.itemsize == 1:
        cast = functools.partial(comfy.model_management.cast_to, own, torch.float32, device)
        # Each copy from RAM would wait for all that the GPU was asked for.
        own = per_run.made((block, device), cast)
    return (own[0][:, None, None] + e).unbind()  # with float32 the sum is taken in it


def _modulations(blocks, e: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """e float32 [6, B, 1, C], and the `_modulation` of each block whose own lies beside it."""
    # The samples of a part side by side: a tape tells its inputs apart by where they lie.
    e = e.reshape(-1, 6, e.shape[-1]).transpose(0, 1).float().contiguous()[:, :, None]
    own = {block: block._parameters.get("modulation") for block in blocks}
    own = {b: x for b, x in own.items() if x is not None and x.device == e.device}
    if not own or any(x.itemsize == 1 for x in own.values()):
        return e, {}
    sums = torch.cat([*own.values()])[:, :, None, None] + e  # [blocks, 6, B, 1, C]
    parts = (part.unbind() for part in sums.unbind(1))
    return e, dict(zip(own, zip(*parts, strict=True), strict=True))


def why_not_fused(block, e, transformer_options: dict) -> str | None:
    """What keeps a block from running fused; None where nothing does."""
    if reason := _other_kind(block):
        return reason
    attn = block._modules["self_attn"]
    if e.ndim == 4 and e.shape[1] != 1:
        return "timesteps differ between tokens"
    if transformer_options.get("patches", {}).keys() & {"attn1_patch", "attn2_patch"}:
        return "a node patches its attention"
    if not is_ours(attn.forward) or is_hooked(attn):
        return "a node patches its self-attention"
    if reason := _other_parts(block):
        return reason
    if not all(map(is_stock, _parts(block))):
        return "a node patches a part of it"
    return None


def why_never_fused(block) -> str | None:
    """What keeps a block from running fused whatever it is given; None where nothing does."""
    return _other_kind(block) or _other_parts(block)


def _other_kind(block) -> str | None:
    if type(block) is not WanAttentionBlock:
        return f"it is a {type(block).__name__}"
    if type(cross_attn := block._modules["cross_attn"]) is not WanT2VCrossAttention:
        return f"its cross-attention is a {type(cross_attn).__name__}"
    if (head_dim := block.dim // block.num_heads) not in HEAD_DIMS:
        return f"its head_dim is {head_dim}, not 64 or 128"
    return None


def _other_parts(block) -> str | None:
    for name in ("self_attn", "cross_attn"):
        if reason := missing_parts(block._modules[name]):
            return reason
    for linear in _linears(block):
        if not isinstance(linear, Linear) or not is_int8(linear._parameters["weight"]):
            return "its weights are not INT8"
    return None


# Not as attributes: those of a module take ten times as long to find, and this is every block.
def _linears(block) -> list[torch.nn.Module]:
    parts = block._modules
    attn, cross_attn = parts["self_attn"]._modules, parts["cross_attn"]._modules
    ffn = parts["ffn"]._modules
    return [*(attn[n] for n in "qkvo"), *(cross_attn[n] for n in "qkvo"), ffn["0"], ffn["2"]]


def _square_linears(parts: dict) -> list[torch.nn.Module]:
    """Those of a block that take as many channels as they give, but for the text's keys and values,
    which are made once in a run."""
    attn, cross_attn = parts["self_attn"]._modules, parts["cross_attn"]._modules
    return [*(attn[n] for n in "qkvo"), cross_attn["q"], cross_attn["o"]]


def _parts(block) -> list[torch.nn.Module]:
    """All of it but its self-attention, which is patched: by us, or see `why_not_fused`."""
    parts = block._modules
    attn, cross_attn = parts["self_attn"]._modules, parts["cross_attn"]._modules
    norms = attn["norm_q"], attn["norm_k"], cross_attn["norm_q"], cross_attn["norm_k"]
    others = (parts[name] for name in ("cross_attn", "ffn", "norm1", "norm2", "norm3"))
    return [*_linears(block), *norms, *others, parts["ffn"]._modules["1"]]
