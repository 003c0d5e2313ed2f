"""INT8 quantization in plain torch: the definition, and the CPU path."""

import torch
from einops import rearrange
from torch import Tensor

from ..checks import BLOCK

SMALLEST_AMAX = 1e-8


def quantize_blocks(x: Tensor, activation: str | None = None) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape[-2:]
    tiles = _to_tiles(_activate(x.float(), activation))
    amax = tiles.abs().amax((-3, -1), keepdim=True).clamp_min(SMALLEST_AMAX)
    q = _from_tiles(_round(tiles, amax), rows, columns)
    return q, (amax / 128).squeeze((-3, -1))


def quantize_rows(
    x: Tensor, activation: str | None = None, amax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    x = _activate(x.float(), activation)
    amax = x.abs().amax(-1) if amax is None else amax
    amax = amax[..., None].clamp_min(SMALLEST_AMAX)
    return _round(x, amax), (amax / 128).squeeze(-1)


def dequantize_blocks(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    tiles = _to_tiles(q) * scale[..., :, None, :, None].float()
    return _from_tiles(tiles, *q.shape[-2:]).to(dtype)


def dequantize_rows(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (q * scale[..., None].float()).to(dtype)


def _activate(x: Tensor, activation: str | None) -> Tensor:
    return x if activation is None else torch.nn.functional.gelu(x, approximate="tanh")


def _round(x: Tensor, amax: Tensor) -> Tensor:
    # Dividing by the scale instead would flip exact halves.
    return (x * (128 / amax)).round().clamp(-128, 127).to(torch.int8)


def _to_tiles(x: Tensor) -> Tensor:
    """[..., R, C] -> [..., ceil(R/128), 128, ceil(C/128), 128], padded with zeros."""
    rows, columns = x.shape[-2:]
    x = torch.nn.functional.pad(x, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return rearrange(x, "... (m r) (n c) -> ... m r n c", r=BLOCK, c=BLOCK)


def _from_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    padded = rearrange(tiles, "... m r n c -> ... (m r) (n c)")
    return padded[..., :rows, :columns].contiguous()
