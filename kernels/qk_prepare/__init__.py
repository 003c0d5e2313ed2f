"""From a projection of q or k to what sparse-linear attention reads, with one writing."""

from types import ModuleType
from typing import NamedTuple

import torch

from ..checks import check_block_size, check_heads, check_shape, float32_on_gpu, not_contiguous
from ..dispatch import choose, has_triton
from ..linear_attention import LinearBranch, check_branch
from ..sparse_attention import Int8Blocks
from . import reference

if has_triton():
    from . import cuda
    from . import triton as triton_kernels
else:
    cuda = triton_kernels = None

__all__ = [
    "Int8Keys",
    "Prepared",
    "norms_of_squares",
    "prepare",
    "prepare_keys",
    "square_sums",
]


class Prepared(NamedTuple):
    """A normalized and rotated q or k as attention reads it, in N blocks of rows."""

    rows: torch.Tensor | None  # [B, L, H, D]; None where their linear branch has their memory
    linear: torch.Tensor | None  # [B, L, H, D], their linear branch; None if not asked for
    means: torch.Tensor  # float32 [B, H, N, D]
    blocks: Int8Blocks | None  # None if not asked for


class Int8Keys(NamedTuple):
    """A normalized and rotated k [B, L, H, D] of which no row is kept, see `prepare_keys`."""

    shape: torch.Size
    means: torch.Tensor  # float32 [B, H, N, D], of the blocks of rows, less `center`
    blocks: Int8Blocks  # of rows less `center`, laid out as attention in CUDA C++ reads them
    center: torch.Tensor  # [B, H, D] in k's dtype

    def of(self, heads: slice) -> "Int8Keys":
        """Those of some heads; views."""
        shape = *self.shape[:2], len(range(self.shape[2])[heads]), self.shape[3]
        blocks = Int8Blocks(*(x[:, heads] for x in self.blocks))
        return Int8Keys(shape, self.means[:, heads], blocks, self.center[:, heads])


def prepare(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    block: int = 128,
    quantize: bool = False,
    out: torch.Tensor | None = None,
    branch: LinearBranch | None = None,
    row_norms: torch.Tensor | None = None,
    backend: str = "auto",
) -> Prepared:
    """RMSNorm over all heads, RoPE, block means and, if asked for, int8 and the linear branch.

    `apply_rope(rms_norm(x))` and, of that, `block_means` and the int8 of `sage_attention`. The
    normalized and the rotated rows are rounded to x's dtype as the two ops round them; so
    everything equals their composition but for the order in which the squares of a row add up.

    Args:
        x: [B, L, H, D], the projection; float32, float16 or bfloat16.
        weight: [H * D] of any float dtype.
        cos, sin: [1 or B, L, D / 2] float32, any strides; see `apply_rope`.
        eps: added to the mean square.
        block: rows in a block, 64 or 128.
        quantize: whether to make int8 blocks.
        out: where the rotated rows go, contiguous like x; may be x itself. A new tensor if None.
        branch: where given, `out` gets the linear branch of the rotated rows in their place: in
            low bits nothing else reads them.
        row_norms: float32 [B, L], 1 / root mean square of each row, eps included: given where x is
            some of the heads that a norm is taken over, see `square_sums`, and where they are
            known without reading x, see `norms_of_squares`.
        backend: see `dispatch.choose`.

    Returns:
        `Prepared`, with `out` as its rows, or as its linear branch where `branch` is given.

    Raises:
        ValueError, TypeError: a shape, block size or dtype does not fit.
    """
    check_block_size(block)
    _check_projection(x, weight, cos, sin, row_norms)
    out = torch.empty(*x.shape, dtype=x.dtype, device=x.device) if out is None else out
    check_shape("out", out, tuple(x.shape))
    if out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous and {x.dtype}, "
            f"got {out.dtype} with strides {list(out.stride())}"
        )
    if branch is not None:
        check_branch(x, branch)
    kernels = _kernels(x, cos, sin, out, branch, backend)
    arguments = x, weight, cos, sin, eps, block, quantize, out, branch, row_norms
    means, *blocks = kernels.prepare(*arguments)
    rows, linear = (out, None) if branch is None else (None, out)
    return Prepared(rows, linear, means, Int8Blocks(*blocks) if quantize else None)


def prepare_keys(
    k: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    row_norms: torch.Tensor | None = None,
    backend: str = "auto",
) -> Int8Keys | None:
    """`prepare` of keys that nothing but attention in low bits reads, in blocks of 64, with one
    reading of k and no rows written; None where it does not run in CUDA C++.

    The int8 and the means are of rows less the mean of a few hundred of them, which may be anything
    that is near: softmax and the order of blocks do not see what is subtracted from every key. For
    the int8 their difference is rounded to k's dtype. The linear branch sums up what the int8
    stands for, so a huge row coarsens that of its 64.

    Args:
        k, weight, cos, sin, eps, row_norms, backend: see `prepare`; k stays as it is.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    _check_projection(k, weight, cos, sin, row_norms)
    if _kernels(k, cos, sin, k, None, backend) is not cuda:
        return None
    means, integers, scale, center = cuda.prepare_keys(k, weight, cos, sin, eps, row_norms)
    return Int8Keys(k.shape, means, Int8Blocks(integers, scale), center)


def _kernels(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out: torch.Tensor,
    branch: LinearBranch | None,
    backend: str,
) -> ModuleType:
    """The module that prepares x, once all is known to fit."""
    return choose(
        "prepare", backend, x, reference, triton_kernels, cuda, cuda,
        unsupported=(not_contiguous(x), None if branch is None else float32_on_gpu(x)),
        operands=(x, cos, sin, out, branch),
    )  # fmt: skip


def square_sums(x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """Sums of squares of each head's row, of which a norm over several heads is made.

    Each in float32 and by itself, so that it does not depend on which heads are at hand.

    Args:
        x: [B, L, H, D], float32, float16 or bfloat16.
        backend: see `dispatch.choose`.

    Returns:
        float32 [B, L, H].

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    check_heads(x=x)
    unsupported = (not_contiguous(x),)
    kernels = choose("square_sums", backend, x, reference, triton_kernels, unsupported=unsupported)
    return kernels.square_sums(x)


def norms_of_squares(
    squares: torch.Tensor, channels: int, eps: float = 1e-6, backend: str = "auto"
) -> torch.Tensor:
    """What `prepare` takes as `row_norms`, 1 / sqrt(mean square + eps), of sums of squares.

    Parts add up in float64, where the sum of some float32 is as good as exact: the same bits
    whatever the parts are put together to before.

    Args:
        squares: float32 or float64 [B, P, L], P parts of the sum of each row's squares, as
            `int8_linear_and_squares` gives them.
        channels: what the squares are of in a row, of all heads.
        eps: added to the mean square.
        backend: see `dispatch.choose`.

    Returns:
        float32 [B, L].

    Raises:
        ValueError, TypeError: a shape or dtype does not fit.
    """
    if squares.ndim != 3:
        raise ValueError(f"squares must be [B, P, L], got {list(squares.shape)}")
    if squares.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"squares must be float32 or float64, got {squares.dtype}")
    kernels = choose("norms_of_squares", backend, squares, reference, triton_kernels)
    return kernels.norms_of_squares(squares, channels, eps)


def _check_projection(
    x: torch.Tensor,
    weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    row_norms: torch.Tensor | None,
) -> None:
    """What is asked of a projection of q or k, and of what it is normed and rotated by."""
    check_heads(x=x)
    check_shape("weight", weight, (x.shape[2] * x.shape[3],))
    check_angles(x, cos, sin)
    if row_norms is not None:
        check_shape("row_norms", row_norms, tuple(x.shape[:2]))
        _check_float32("row_norms", row_norms)


def _check_float32(name: str, x: torch.Tensor) -> None:
    if x.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {x.dtype}")


def check_angles(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Require the cosines and sines of a rotation of x [B, L, H, D]."""
    batch, length, _, dim = x.shape
    for name, angles in (("cos", cos), ("sin", sin)):
        samples = 1 if angles.shape[:1] == (1,) else batch
        check_shape(name, angles, (samples, length, dim // 2))
        _check_float32(name, angles)
