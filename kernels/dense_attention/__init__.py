"""Dense attention that forward-mode differentiation goes through, in plain torch."""

import torch

from ..derivatives import has_tangent

SCORES = 2**26  # at a time, 256 MB of float32; three such tensors are alive

__all__ = ["attention_with_jvp"]


def attention_with_jvp(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, also under torch.func.jvp, where torch's fused kernels stop.

    Tangents are made of a few rows of scores at a time, so that Lq x Lk never exists. Products are
    in float32: torch.backends.cuda.matmul.allow_tf32 decides how fast, and costs operands of 16
    bits nothing. The values, and gradients where none of the inputs has a tangent, are those of
    torch's scaled_dot_product_attention.

    Args:
        q: [B, Lq, H, D], any float dtype.
        k, v: [B, Lk, H, D] of the same dtype.

    Returns:
        [B, Lq, H, D] in q's dtype.
    """
    if any(map(has_tangent, (q, k, v))):
        return _Attention.apply(q, k, v)
    return _attention(q, k, v)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """Of q, k and v."""

    @staticmethod
    def forward(q, k, v):
        # No view, as _attention's is: forward mode wants a view's tangent to lie as the view does.
        return _attention(q, k, v).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = output.dtype  # in autocast another than the inputs'
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = _attention(*inputs)
        return torch.autograd.grad(out, inputs, d_out)

    @staticmethod
    def jvp(ctx, *tangents):
        q, k, v, tq, tk, tv = (_by_heads(x) for x in (*ctx.saved_tensors, *tangents))
        scale, rows = q.shape[-1] ** -0.5, max(1, SCORES // (q.shape[:2].numel() * k.shape[2]))
        parts = zip((q * scale).split(rows, 2), (tq * scale).split(rows, 2), strict=True)
        with torch.autocast(q.device.type, enabled=False):
            t_out = [_rows_jvp(*part, k, v, tk, tv) for part in parts]
        return torch.cat(t_out, 2).transpose(1, 2).to(ctx.dtype).contiguous()


def _by_heads(x: torch.Tensor) -> torch.Tensor:
    """[B, L, H, D] as [B, H, L, D] in at least float32."""
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def _rows_jvp(q, tq, k, v, tk, tv) -> torch.Tensor:
    """P tv + h v - rowsum(h) * (P v), where P = softmax(q k^T) and h = P * (tq k^T + q tk^T)."""
    weights = (q @ k.mT).softmax(-1)  # [B, H, rows, Lk]
    h = (tq @ k.mT + q @ tk.mT).mul_(weights)
    return weights @ tv + h @ v - h.sum(-1, keepdim=True) * (weights @ v)
