"""LayerNorm and INT8 quantization in plain torch: the definition, and the CPU path."""

from torch import Tensor

from ..int8_quant.reference import quantize_blocks, quantize_rows
from ..norm.reference import layer_norm


def layer_norm_quant(
    x: Tensor,
    granularity: str,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    quantize = quantize_rows if granularity == "rows" else quantize_blocks
    return quantize(layer_norm(x.float(), weight, bias, scale, shift, eps))
