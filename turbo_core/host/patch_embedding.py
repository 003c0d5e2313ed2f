"""Wan's patch embedding as one product of 16-bit numbers, which leaves tokens as blocks read them.

The host convolves in float32, by tf32 on a GPU, and then rounds to the model's dtype: of 14B at
720p 1.5 GB that are written and read again. No two patches share a number, so it is a product of
patches with the weight. Here both are sums of two 16-bit numbers, high + low, of which low x low is
left out: what is added up in float32 is closer to float32's own than tf32 is, and rounded once.
"""

import contextlib
from collections.abc import Iterator

import torch
from einops import rearrange

from .gradients import records_graph
from .patch_owner import is_stock

DEVICES = ("cuda",)  # on others the host's convolution stays
ONES = 8  # columns for the bias, of which two are used: rows stay multiples of 16 bytes


@contextlib.contextmanager
def rounded_at_once(wan: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Meanwhile the patch embedding of `wan` may give `dtype`, to which the host rounds it."""
    conv = wan.patch_embedding
    ours = hasattr(conv, "rounded_to") and is_stock(conv)
    if not ours or dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    before, conv.rounded_to = conv.rounded_to, dtype
    try:
        yield
    finally:
        conv.rounded_to = before


@torch.compiler.disable  # which cannot trace how sums are made
def is_one_product(conv: torch.nn.Conv3d, x: torch.Tensor) -> bool:
    """Whether `patches_times` may stand for the convolution of x [B, C, T, H, W]."""
    dtype = conv.rounded_to
    if dtype is None or x.dtype != torch.float32 or x.device.type not in DEVICES:
        return False
    plain = conv.groups == max(conv.dilation) == 1 and not any(conv.padding)
    if conv.kernel_size != conv.stride or not plain:
        return False
    if any(size % patch for size, patch in zip(x.shape[2:], conv.stride, strict=True)):
        return False
    # An option of ComfyUI's: then sums would have 16 bits.
    in_16_bits = getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)
    return not (dtype == torch.float16 and in_16_bits) and not records_graph(conv, x)


@torch.compiler.disable  # which would take `low` for 0
def patches_times(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The convolution of x [B, C, T, H, W] with `weight` [N, C, t, h, w] as its stride, plus `bias`
    [N], all float32: [B, N, T / t, H / h, W / w] in `dtype`, channels side by side."""
    t, h, w = weight.shape[2:]
    patches = rearrange(x, "b c (f t) (y h) (x w) -> b f y x (c t h w)", t=t, h=h, w=w)
    high, low = _split(patches, dtype)
    weight_high, weight_low = _split(weight.flatten(1), dtype)
    ones = torch.ones(*high.shape[:-1], ONES, dtype=dtype, device=x.device)
    biases = torch.zeros(len(weight), ONES, dtype=dtype, device=x.device)
    if bias is not None:
        biases[:, 0], biases[:, 1] = _split(bias, dtype)
    rows = torch.cat((high, low, high, ones), -1)
    columns = torch.cat((weight_high, weight_high, weight_low, biases), -1)
    return torch.nn.functional.linear(rows, columns).permute(0, 4, 1, 2, 3)


def _split(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """high + low = x, but for what neither has bits for."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)
