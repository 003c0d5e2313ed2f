"""LayerNorm straight to INT8: what a quantized linear layer behind a norm takes."""

from torch import Tensor

from ..checks import layouts
from ..dispatch import choose, has_triton
from ..norm import check_layer_norm
from . import reference

if has_triton():
    from . import cuda
    from . import triton as triton_kernels
else:
    cuda = triton_kernels = None

SCALES = ("rows", "blocks")


def layer_norm_quant(
    x: Tensor,
    granularity: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Quantize y = ((x - mean) / sqrt(var + eps) * weight + bias) * (1 + scale) + shift.

    `kernels.norm.layer_norm`, then `kernels.int8_quant` (TurboDiffusion, arXiv 2512.16093, W8A8),
    with y in fp32 all the way: it is rounded once, to the integers.

    Args:
        x: `[B, L, C]` fp32, fp16 or bf16.
        granularity: "rows" for one scale per token, "blocks" for one per 128 tokens by 128
            channels; the blocks restart at every sample.
        weight, bias: `[C]` of any float dtype.
        scale, shift: `[B, 1, C]` or `[B, L, C]` (B may be 1 too), any float dtype and strides.
        eps: added to the variance.
        backend: "auto", "triton" or "reference".

    Returns:
        int8 `[B, L, C]` and fp32 scales, `[B, L]` for rows and
        `[B, ceil(L/128), ceil(C/128)]` for blocks.

    Raises:
        ValueError: shapes do not fit x, x has no elements, or the granularity is unknown.
        TypeError: x is of another dtype.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    if granularity not in SCALES:
        raise ValueError(
            f"layer_norm_quant needs granularity 'rows' or 'blocks', got {granularity!r}"
        )
    check_layer_norm("layer_norm_quant", x, weight, bias, scale, shift)
    if x.numel() == 0:
        raise ValueError(f"layer_norm_quant needs x with elements in it, got {list(x.shape)}")
    vectors = weight, bias, scale, shift
    in_cuda = cuda if granularity == "rows" else None  # blocks run in Triton
    kernels = choose(
        "layer_norm_quant", backend, x, reference, triton_kernels, in_cuda, in_cuda,
        operands=(x, *vectors), layout=layouts(x, *vectors),
    )  # fmt: skip
    return kernels.layer_norm_quant(x, granularity, *vectors, eps)
