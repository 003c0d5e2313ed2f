"""RMSNorm, and LayerNorm with the modulation of a diffusion transformer, in fp32 maths."""

from torch import Tensor

from ..checks import check_dtype
from ..derivatives import no_gradients
from ..dispatch import choose, has_triton
from . import reference

if has_triton():
    from . import triton as triton_kernels
else:
    triton_kernels = None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, all in fp32.

    Args:
        x: `[..., C]` fp32, fp16 or bf16.
        weight: `[C]` of any float dtype.
        eps: added to the mean square.
        backend: "auto", "triton" or "reference".

    Returns:
        `[..., C]` in x's dtype.

    Raises:
        ValueError: the weight does not fit x.
        TypeError: x is of another dtype.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    check_dtype("rms_norm", x)
    _check_vector("rms_norm", "weight", weight, x)
    unsupported = (no_gradients(x, weight),)
    kernels = choose("rms_norm", backend, x, reference, triton_kernels, unsupported=unsupported)
    return kernels.rms_norm(x, weight, eps)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """y = ((x - mean) / sqrt(var + eps) * weight + bias) * (1 + scale) + shift, all in fp32.

    The variance is that of the C real channels, in a second pass around the mean. Whatever is
    None is left out.

    Args:
        x: `[B, L, C]` fp32, fp16 or bf16.
        weight, bias: `[C]` of any float dtype.
        scale, shift: `[B, 1, C]` or `[B, L, C]` (B may be 1 too), any float dtype and strides.
        eps: added to the variance.
        backend: "auto", "triton" or "reference".

    Returns:
        `[B, L, C]` in x's dtype.

    Raises:
        ValueError: shapes do not fit x.
        TypeError: x is of another dtype.
        RuntimeError: Triton was asked for by name and cannot run.
    """
    check_layer_norm("layer_norm", x, weight, bias, scale, shift)
    kernels = choose("layer_norm", backend, x, reference, triton_kernels)
    return kernels.layer_norm(x, weight, bias, scale, shift, eps)


def check_layer_norm(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    """Refuse operands of `op` that are not those of `layer_norm`, with its errors."""
    check_dtype(op, x)
    if x.ndim != 3:
        raise ValueError(f"{op} needs x [B, L, C], got {list(x.shape)}")
    for name, vector in (("weight", weight), ("bias", bias)):
        _check_vector(op, name, vector, x)
    for name, modulation in (("scale", scale), ("shift", shift)):
        _check_modulation(op, name, modulation, x)


def _check_vector(op: str, name: str, vector: Tensor | None, x: Tensor) -> None:
    if vector is not None and vector.shape != x.shape[-1:]:
        raise ValueError(f"{op} needs {name} [{x.shape[-1]}], got {list(vector.shape)}")


def _check_modulation(op: str, name: str, modulation: Tensor | None, x: Tensor) -> None:
    if modulation is None:
        return
    batch, length, channels = x.shape
    shape = list(modulation.shape)
    fits = len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, length)
    if not fits or shape[2] != channels:
        raise ValueError(f"{op} needs {name} [{batch}, 1 or {length}, {channels}], got {shape}")
