"""The INT8 linear layer by mma.sync, for GeForce cards and A100, in CUDA C++: see mma.cu."""

from pathlib import Path

import torch
from torch import Tensor

from .. import nvrtc, tuning
from ..dispatch import capability, multiprocessors
from . import hopper

SOURCE = Path(__file__).with_suffix(".cu")
Operands = nvrtc.operands(
    pointers="x x_scale w w_scale bias gate residual out squares",
    integers="batch length n k x_b x_l w_n gate_b residual_b residual_l out_b out_l",
)


def unfit(x_q: Tensor, x_scale: Tensor, w_q: Tensor, *rest: Tensor | None) -> str | None:
    """Why the kernel cannot compute this linear, in either granularity; None where it can."""
    if max(map(_bytes_spanned, (x_q, w_q))) > 2**32:
        return "x or w spans more than 4 GiB"
    if x_q.shape[-1] % 16:  # whole 16 bytes are copied, or zeros
        return "K is not a multiple of 16"
    return hopper.unfit(x_q, x_scale, w_q, *rest)  # the same rows, columns and epilogues


def _bytes_spanned(x: Tensor) -> int:
    """From the first byte of x, int8, to its last."""
    return 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))


def tiles(card: tuple[int, int], multiprocessors: int, by_blocks: bool) -> tuple[int, int, int]:
    """Rows and columns of what a program takes at a time, and how many there are at once."""
    tile = tuning.linear_tile(card, by_blocks)
    return tile.rows, tile.columns, tile.programs * multiprocessors


def linear(
    x_q: Tensor,
    x_scale: Tensor,
    w_q: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    squares: Tensor | None = None,
) -> Tensor:
    """`int8_linear` in either granularity, of what is not `unfit`; to `squares` as below."""
    batch, length, k = x_q.shape
    n = w_q.shape[0]
    card, by_blocks = capability(x_q.device), x_scale.ndim == 3
    rows, columns, at_once = tiles(card, multiprocessors(x_q.device), by_blocks)
    many = batch * -(-length // rows) * -(-n // columns)
    x_scale = x_scale.contiguous()
    operands = Operands(
        *map(nvrtc.address, (x_q, x_scale, w_q, w_scale, bias, gate, residual, out, squares)),
        batch, length, n, k, *x_q.stride()[:2], w_q.stride(0),
        0 if gate is None else gate.stride(0),
        *((0, 0) if residual is None else residual.stride()[:2]), *out.stride()[:2],
    )  # fmt: skip
    tile = tuning.linear_tile(card, by_blocks)
    others = None if by_blocks else (residual is not None, squares is not None)
    kernel = _kernel(tile, others, out)
    kernel.launch(min(many, at_once), tile.threads, operands)
    return out


def linear_and_squares(*operands: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`linear` without a residual, and what its rows' squares add up to before they are rounded.

    float32 [B, P, L], in P parts to add up; None where the columns are not whole warps' ones.
    """
    x_q, x_scale, *_, out = operands
    batch, length, n = out.shape
    columns = tuning.linear_tile(capability(x_q.device), x_scale.ndim == 3).warp_n
    if n % columns:
        return linear(*operands), None
    squares = torch.empty(batch, n // columns, length, dtype=torch.float32, device=out.device)
    return linear(*operands, squares), squares


def shared_bytes(tile: tuning.WarpTile, by_blocks: bool) -> int:
    """mma.cu's Shared: the places of x and w, gates and bias, scales and three tiles' places."""
    rows, columns, step = tile.rows, tile.columns, tile.step
    if by_blocks:  # one place for x, for w `stages` with two barriers each; 8 bytes align all
        return _up_to_8(rows * step + tile.stages * (columns * step + 16) + 6 * columns + 44)
    return tile.stages * (rows + columns) * step + 6 * columns + 4 * (rows + columns) + 36


def _up_to_8(size: int) -> int:
    return -(-size // 8) * 8


def constants(
    tile: tuning.WarpTile, others: tuple[bool, bool] | None, dtype: torch.dtype
) -> dict[str, int]:
    """What mma.cu is compiled with: `others` say whether there is a residual and whether squares
    are asked for; None with a scale for each block, where one kernel is for all."""
    residual, squares = others or (False, False)
    return {
        "WARPS_L": tile.warps_l, "WARPS_N": tile.warps_n,
        "WARP_L": tile.warp_l, "WARP_N": tile.warp_n,
        "STEP": tile.step, "STAGES": tile.stages, "PROGRAMS": tile.programs,
        "BLOCKS": int(others is None), "RESIDUAL": int(residual), "SQUARES": int(squares),
        "BF16": int(dtype == torch.bfloat16),
    }  # fmt: skip


def _kernel(tile: tuning.WarpTile, others: tuple[bool, bool] | None, out: Tensor) -> nvrtc.Kernel:
    target = nvrtc.target_of(capability(out.device), out.device)
    return nvrtc.load(
        SOURCE, "int8_linear", target, shared_bytes(tile, others is None), Operands,
        out.get_device(), **constants(tile, others, out.dtype),
    )  # fmt: skip
