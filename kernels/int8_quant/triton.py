"""INT8 quantization in Triton: the same integers as the reference, every value read once."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import BLOCK
from ..dispatch import multiprocessors
from ..launching import launched
from ..norm.triton import load_row, row_launch, row_pieces, store_row
from ..room import in_whole_blocks
from ..tuning import GELU_ROWS, QUANTIZE_BLOCKS, RowLoop, of_width

BLOCKS_LAUNCH = {"BLOCK": BLOCK, **QUANTIZE_BLOCKS}


def quantize_blocks(x: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[-2:]
    row_blocks, column_blocks = -(-rows // BLOCK), -(-columns // BLOCK)
    batched = x.reshape(-1, rows, columns)
    q = torch.empty(*x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(
        *x.shape[:-2], row_blocks, column_blocks, dtype=torch.float32, device=x.device
    )
    quantize_blocks_kernel[(scale.numel(),)](
        batched, q, scale, rows, columns, *batched.stride(), activation, **BLOCKS_LAUNCH
    )
    return q, scale


def quantize_rows(
    x: Tensor, activation: str | None, amax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[-2:]
    batched = x if x.ndim == 3 else x.reshape(-1, rows, columns)
    q = in_whole_blocks(*batched.shape, torch.int8, x.device)
    q = q if x.ndim == 3 else q.view(x.shape)
    scale = torch.empty(*x.shape[:-1], dtype=torch.float32, device=x.device)
    if activation is None:
        given = x if amax is None else amax.contiguous()
        quantize_rows_kernel[(scale.numel(),)](
            batched, given, q, scale, rows, columns, *batched.stride(),
            GIVEN=amax is not None, **row_launch(columns),
        )  # fmt: skip
    else:
        loop = of_width(GELU_ROWS, columns)
        activate_rows_kernel[loop_grid(loop, *batched.shape[:2], x.device)](
            batched, q, scale, rows, *batched.stride(), activation, columns,
            **gelu_launch(loop, columns),
        )  # fmt: skip
    return q, scale


@functools.cache
def gelu_launch(loop: RowLoop, columns: int) -> dict[str, object]:
    """Launch of `activate_rows_kernel`."""
    return {"PIECES": row_pieces(columns), **loop.launch()}


def loop_grid(loop: RowLoop, batch: int, rows: int, device: torch.device) -> tuple[int, int]:
    """Samples, and programs for the rows of each: together what the card runs at once."""
    return batch, min(rows, -(-multiprocessors(device) * loop.programs // batch))


@triton.jit
def larger(a, b):
    """The larger of both, NaN where one is: the same instruction as the max that ignores NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, AXIS: tl.constexpr = None):
    """`tl.max` that is NaN where an element is."""
    return tl.reduce(x, AXIS, larger)


@triton.jit
def round_to_int8(x, amax):
    """The reference's int8: round half to even of x * (128 / amax)."""
    scaled = x * tl.div_rn(tl.full(amax.shape, 128.0, tl.float32), amax)
    # Clamped first: the product must be rounded before the addition, which no FMA can then skip.
    # Not from below: -amax gives -128, or the float under it, which rounds to -128 as well.
    scaled = tl.minimum(scaled, 127.0)
    # Adding 1.5 * 2^23 leaves no bit for the fraction, and fp32 additions round half to even: the
    # low byte of the sum is the integer.
    return (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantize_tile(x):
    """int8 of fp32 x and its scale, one for all of it."""
    amax = larger(largest(tl.abs(x)), 1e-8)
    return round_to_int8(x, amax), amax * (1 / 128)


@triton.jit
def quantize_row(row, q_ptr, scale_ptr, CHANNELS: tl.constexpr, PIECES: tl.constexpr):
    """Write the int8 of a row in pieces, as `load_row` gives them, and its scale."""
    amax = 1e-8
    for i in tl.static_range(len(PIECES)):
        amax = larger(largest(tl.abs(row[i])), amax)
    q = ()
    for i in tl.static_range(len(PIECES)):
        q += (round_to_int8(row[i], amax),)
    store_row(q_ptr, q, CHANNELS, PIECES)
    tl.store(scale_ptr, amax * (1 / 128))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of fp32 x; each maps 0, and so what is masked, to 0."""
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)), which overflows to 0 and 1 as it should.
        exponent = -2.302208198144325 * (x + 0.044715 * x * x * x)  # -2u / ln 2
        x = x / (1 + tl.exp2(exponent))
    return x


@launched
@triton.jit(do_not_specialize=["rows"])
def quantize_blocks_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    rows,
    columns,
    stride_b,
    stride_r,
    stride_c,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    column_blocks = tl.cdiv(columns, BLOCK)
    row_blocks = tl.cdiv(rows, BLOCK)
    batch = (pid // (row_blocks * column_blocks)).to(tl.int64)
    r = (pid // column_blocks % row_blocks * BLOCK).to(tl.int64) + tl.arange(0, BLOCK)
    c = (pid % column_blocks * BLOCK).to(tl.int64) + tl.arange(0, BLOCK)
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    x = tl.load(
        x_ptr + batch * stride_b + r[:, None] * stride_r + c[None, :] * stride_c,
        mask=inside,
        other=0.0,
    )  # [BLOCK, BLOCK]
    q, scale = quantize_tile(activate(x.to(tl.float32), ACTIVATION))
    tl.store(q_ptr + (batch * rows + r[:, None]) * columns + c[None, :], q, mask=inside)
    tl.store(scale_ptr + pid, scale)


@launched
@triton.jit(do_not_specialize=["rows"])
def quantize_rows_kernel(
    x_ptr,
    amax_ptr,
    q_ptr,
    scale_ptr,
    rows,
    columns,
    stride_b,
    stride_r,
    stride_c,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    x_ptr += (pid // rows).to(tl.int64) * stride_b + (pid % rows).to(tl.int64) * stride_r
    c = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + c.to(tl.int64) * stride_c, mask=c < columns, other=0.0)
    x = x.to(tl.float32)
    amax = tl.load(amax_ptr + pid) if GIVEN else largest(tl.abs(x))
    amax = larger(amax, 1e-8)
    q, scale = round_to_int8(x, amax), amax * (1 / 128)
    tl.store(q_ptr + pid.to(tl.int64) * columns + c, q, mask=c < columns)
    tl.store(scale_ptr + pid, scale)


@launched
@triton.jit(do_not_specialize=["rows"])
def activate_rows_kernel(
    x_ptr, q_ptr, scale_ptr, rows, stride_b, stride_r, stride_c,
    ACTIVATION: tl.constexpr, CHANNELS: tl.constexpr, PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(0).to(tl.int64)
    first, step = tl.program_id(1), tl.num_programs(1)
    x_ptr += batch * stride_b
    for i in tl.range(0, tl.cdiv(rows - first, step), num_stages=STAGES):
        row = (first + i * step).to(tl.int64)
        x = load_row(x_ptr + row * stride_r, stride_c, CHANNELS, PIECES)
        y = ()
        for j in tl.static_range(len(PIECES)):
            y += (activate(x[j], ACTIVATION),)
        out = batch * rows + row
        quantize_row(y, q_ptr + out * CHANNELS, scale_ptr + out, CHANNELS, PIECES)
