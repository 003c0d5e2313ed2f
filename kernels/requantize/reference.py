"""Requantization in plain torch: the definition of the op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..int8_quant import reference

MOST = 6  # weights at once


def requantize_rows(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return reference.quantize_rows(reference.dequantize_blocks(q, scale, torch.float32))


def requantize_rows_of(weights: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [requantize_rows(*weight) for weight in weights]
