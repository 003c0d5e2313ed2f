"""Calls of the pack's kernels as a Wan model makes them, on arbitrary values."""

from typing import NamedTuple

import torch

TEXT_LENGTH = 512
HEAD_DIM = 128


class Model(NamedTuple):
    """Channels of a token and within the MLP."""

    dim: int
    ffn_dim: int


SMALL, LARGE = Model(1536, 8960), Model(5120, 13824)  # Wan 1.3B and 14B


def tensor(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype, device=device)
    return x if device == "cpu" else x.fill_(1)  # no kernel reads it on the CPU


def vectors(*shape: int, device: str = "cpu") -> torch.Tensor:
    """Norms, scales, modulations: what is float32 in a model."""
    return tensor(*shape, device=device, dtype=torch.float32)


def quantizer(granularity: str):
    from turbodiffusion_pack.kernels.int8_quant import quantize_blocks, quantize_rows

    return {"rows": quantize_rows, "blocks": quantize_blocks}[granularity]


def run_block(
    length: int,
    topk: float,
    granularity: str,
    device: str,
    low_bit: bool = True,
    model: Model = SMALL,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """The kernels of one fused block, in its order."""
    from turbodiffusion_pack.kernels.int8_linear import int8_linear, int8_linear_and_squares
    from turbodiffusion_pack.kernels.norm import rms_norm
    from turbodiffusion_pack.kernels.norm_quant import layer_norm_quant
    from turbodiffusion_pack.kernels.qk_prepare import norms_of_squares
    from turbodiffusion_pack.kernels.requantize import requantize_rows, requantize_rows_of
    from turbodiffusion_pack.kernels.sla import sla_from_projections
    from turbodiffusion_pack.kernels.text_attention import text_attention

    quantize = quantizer(granularity)
    common = {"backend": "triton"}

    def weights(n, k):
        q = tensor(n, k, device=device, dtype=torch.int8)
        scale = vectors(n // 128, k // 128, device=device)
        if granularity == "rows":
            q, scale = requantize_rows(q, scale, **common)
        return q, scale, tensor(n, device=device, dtype=dtype), dtype

    if granularity == "rows":
        q, scale = tensor(model.dim, model.dim, device=device, dtype=torch.int8), model.dim // 128
        requantize_rows_of([(q, vectors(scale, scale, device=device))] * 6, **common)
    x, text = (tensor(1, n, model.dim, device=device, dtype=dtype) for n in (length, TEXT_LENGTH))
    shift, scale, gate, *_ = vectors(1, 6, model.dim, device=device).chunk(6, dim=1)
    norm, square = vectors(model.dim, device=device), weights(model.dim, model.dim)
    cos, sin = (vectors(1, length, HEAD_DIM // 2, device=device) for _ in range(2))
    proj = vectors(HEAD_DIM, HEAD_DIM, device=device), vectors(HEAD_DIM, device=device)
    n = layer_norm_quant(x, granularity, scale=scale, shift=shift, **common)

    def with_row_norms():
        y, squares = int8_linear_and_squares(*n, *square, **common)
        norms = None if squares is None else norms_of_squares(squares, model.dim, **common)
        return y.unflatten(2, (-1, HEAD_DIM)), norms

    v = int8_linear(*n, *square, **common).unflatten(2, (-1, HEAD_DIM))
    options = {"topk": topk, "low_bit": low_bit, **common}
    of_qkv = with_row_norms, with_row_norms, v
    y = sla_from_projections(*of_qkv, (norm, norm), (cos, sin), proj, **options)
    y = quantize(y.flatten(2), **common)
    int8_linear(*y, *square, gate=gate, residual=x, **common)
    n = layer_norm_quant(x, granularity, weight=norm, bias=norm, **common)
    q = rms_norm(int8_linear(*n, *square, **common), norm, **common)
    k = rms_norm(int8_linear(*quantize(text, **common), *square, **common), norm, **common)
    q, k = (y.unflatten(2, (-1, HEAD_DIM)) for y in (q, k))
    for keys in (k, k[:, :100]):
        text_attention(q, keys, keys, 2, out=q, **common)
        text_attention(q, keys, keys, 2, norm, cos[..., 0], out=q, **common)
    int8_linear(*n, *square, residual=x, out=x, **common)
    up, down = weights(model.ffn_dim, model.dim), weights(model.dim, model.ffn_dim)
    for part in x.split(-(-length // 256) * 128, dim=1):
        n = layer_norm_quant(part, granularity, scale=scale, shift=shift, **common)
        h = quantize(int8_linear(*n, *up, **common), activation="gelu_tanh", **common)
        int8_linear(*h, *down, gate=gate, residual=part, out=part, **common)


def run_apart(length: int, granularity: str, model: Model) -> None:
    """What runs where the fused block steps aside: norms, RoPE, float weights after a LoRA. And
    what runs after a linear that is no Triton kernel."""
    from turbodiffusion_pack.kernels.int8_linear import int8_linear
    from turbodiffusion_pack.kernels.norm import layer_norm, rms_norm
    from turbodiffusion_pack.kernels.norm_quant import layer_norm_quant
    from turbodiffusion_pack.kernels.qk_prepare import norms_of_squares
    from turbodiffusion_pack.kernels.rope import apply_rope

    common = {"backend": "triton"}
    quantize = quantizer(granularity)
    x, norm = tensor(1, length, model.dim), vectors(model.dim)
    of_sample, of_token = vectors(1, 1, model.dim), vectors(1, length, model.dim)
    rms_norm(x, norm, **common)
    layer_norm(x, norm, norm, of_sample, of_sample, **common)
    angles = vectors(1, length, HEAD_DIM // 2)
    apply_rope(x.unflatten(2, (-1, HEAD_DIM)), angles, angles, **common)
    quantize(tensor(model.dim, model.ffn_dim), **common)
    q, scale = layer_norm_quant(x, granularity, scale=of_token, shift=of_token, **common)
    weight = quantize(tensor(model.dim, model.dim), **common)
    residual = vectors(1, length, model.dim)
    rest = {"out_dtype": torch.float32, "gate": of_token, "residual": residual, **common}
    int8_linear(q, scale, *weight, norm, **rest)
    # A tensor map cannot address such rows.
    odd = tensor(1, length, model.dim + 8, dtype=torch.int8)[..., : model.dim]
    int8_linear(odd, scale, *weight, tensor(model.dim), **common)
    for columns in (64, 128, 256):  # by mma.sync with scales of rows, of blocks; on Hopper
        norms_of_squares(vectors(1, model.dim // columns, length), model.dim, **common)


def run_shared(length: int, model: Model) -> None:
    """What a GPU runs besides that has half of the heads."""
    from turbodiffusion_pack.kernels.int8_quant import quantize_rows
    from turbodiffusion_pack.kernels.qk_prepare import norms_of_squares, square_sums

    y = tensor(1, length, model.dim // 2)
    square_sums(y.unflatten(2, (-1, HEAD_DIM)), backend="triton")
    norms_of_squares(tensor(1, 1, length, dtype=torch.float64), model.dim, backend="triton")
    quantize_rows(y, backend="triton", amax=vectors(1, length))


def run_attention(
    length: int, values: str, head_dim: int, block_q: int, block_k: int, linear: bool = True
) -> None:
    """Sparse attention of rotated heads with such values, on its own or with its linear branch."""
    from turbodiffusion_pack.kernels.sla import sla

    q, k, v = (tensor(1, length, 12, head_dim) for _ in "qkv")
    proj = (vectors(head_dim, head_dim), vectors(head_dim)) if linear else None
    low_bit = {} if values == "bf16" else {"low_bit": True, "pv": values}
    options = {"block_q": block_q, "block_k": block_k, "backend": "triton", **low_bit}
    sla(q, k, v, proj, **options)


def run_training(
    length: int,
    topk: float,
    device: str,
    head_dim: int = HEAD_DIM,
    block_q: int = 128,
    block_k: int = 64,
) -> None:
    """Sparse-linear attention in 16 bits as training runs it: forward, backward, forward mode."""
    from turbodiffusion_pack.kernels.block_map import selected_count
    from turbodiffusion_pack.kernels.sla import sla

    def attend(q, k, v, *proj):
        blocks = {"block_map": chosen, "block_q": block_q, "block_k": block_k}
        return sla(q, k, v, proj, **blocks, backend="triton")

    count = selected_count(topk, -(-length // block_k))
    chosen = torch.zeros(1, 12, -(-length // block_q), count, dtype=torch.int32, device=device)
    q, k, v, d_out = (tensor(1, length, 12, head_dim, device=device) for _ in range(4))
    proj = vectors(head_dim, head_dim, device=device), vectors(head_dim, device=device)
    inputs = tuple(x.requires_grad_() for x in (q, k, v, *proj))
    attend(*inputs).backward(d_out)
    with torch.no_grad():
        torch.func.jvp(attend, inputs, inputs)


def run_selection(blocks: int) -> None:
    """The best of as many key blocks."""
    from turbodiffusion_pack.kernels.block_map import select_blocks

    means = vectors(1, 1, blocks, HEAD_DIM)
    select_blocks(means[:, :, :1], means, 1, backend="triton")


def run_vae(device: str, dim: int = 96, latents: tuple[int, int] = (30, 52)) -> None:
    """What stands between the convolutions of Wan's VAE, on its largest level and its smallest."""
    from turbodiffusion_pack.kernels.causal_frames import (
        causal_frames,
        frames_apart,
        resample_frames,
    )

    common = {"backend": "triton"}
    height, width = latents
    for channels, frames, scale in ((4 * dim, 1, 1), (4 * dim, 2, 2), (dim, 4, 8)):
        size = scale * height, scale * width, channels
        x, y, cache = (tensor(1, n, *size, device=device) for n in (frames, frames, 2))
        vector = tensor(channels, device=device)
        causal_frames(x, cache, vector, vector, y, keep=True, **common)
        causal_frames(x, cache, vector, vector, **common)
        causal_frames(x, cache, None, vector, y, **common)
        causal_frames(x, cache[:, :1].contiguous(), None, vector, **common)
        frames_apart(x, cache, vector, **common)
        resample_frames(x, vector, y, scale=2, **common)
        resample_frames(x, vector, y, corner=1, **common)
        resample_frames(x, vector, split=2, scale=2, **common)
        resample_frames(x, vector, y, **common)
