"""Sparse-linear attention as one differentiable function, with gradients and with tangents.

The formulas are the ops' own, `sparse_attention_backward`, `linear_attention_jvp` and so on; here
is what is kept between forward and backward, and for whom.
"""

import functools
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..block_map import block_map as select_block_map
from ..linear_attention import (
    LinearBranch,
    key_value_state,
    linear_attention,
    linear_attention_backward,
    linear_attention_jvp,
)
from ..sparse_attention import (
    sparse_attention_backward,
    sparse_attention_jvp,
    sparse_attention_with_lse,
)


class Options(NamedTuple):
    """What `sla` takes besides tensors."""

    topk: float
    feature_map: str
    block_q: int
    block_k: int
    backend: str


class Saved(NamedTuple):
    """What forward, backward and jvp share; the last four are None without a projection."""

    q: torch.Tensor  # [B, L, H, D] as k and v
    k: torch.Tensor
    v: torch.Tensor
    block_map: torch.Tensor  # int32 [B, H, NQ, count]
    sparse: torch.Tensor  # [B, L, H, D], the sparse part of the result
    lse: torch.Tensor  # float32 [B, H, L]
    state: torch.Tensor | None  # float32 [B, H, D, D]
    normalizer: torch.Tensor | None  # float32 [B, H, D]
    weight: torch.Tensor | None  # [D, D], of the projection
    bias: torch.Tensor | None  # [D]


class SparseLinearAttention(torch.autograd.Function):
    """`sla` of q, k, v, weight, bias, block_map and Options.

    The block map is a constant: indices have no gradients. It is selected from q and k alone, in a
    fixed order, so that activation checkpointing selects it again.
    """

    @staticmethod
    def forward(q, k, v, weight, bias, block_map, options):
        """The result, and what is saved beyond the inputs: torch.func wants both returned."""
        chosen = block_map
        if block_map is None:
            shape = options.block_q, options.block_k
            chosen = select_block_map(q, k, options.topk, *shape, options.backend)
        sparse, lse = sparse_attention_with_lse(q, k, v, chosen, *options[2:])
        own = chosen if block_map is None else None
        if weight is None:
            return sparse, own, None, lse, None, None
        sums = key_value_state(k, v, options.feature_map, options.backend)
        linear = linear_attention(q, *sums, weight, bias, options.feature_map, options.backend)
        return linear.add_(sparse), own, sparse, lse, *sums

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, weight, bias, block_map, ctx.options = inputs
        out, own, sparse, lse, state, normalizer = output
        ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
        block_map = own if block_map is None else block_map
        sparse = out if sparse is None else sparse
        saved = Saved(q, k, v, block_map, sparse, lse, state, normalizer, weight, bias)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, *_):
        compute = functools.partial(_gradients, ctx.options)
        return *_OnPlainTensors.apply(compute, d_out.contiguous(), *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx, tq, tk, tv, t_weight, t_bias, *_):
        tangents = tq, tk, tv, t_weight, t_bias
        compute = functools.partial(_tangent, ctx.options)
        t_out = _OnPlainTensors.apply(compute, *tangents, *ctx.saved_tensors)
        return t_out, None, None, None, None, None


class _OnPlainTensors(torch.autograd.Function):
    """compute(*tensors), where backward and jvp get tensors that torch.func has wrapped.

    A kernel cannot reach the memory of those; forward gets what is inside.
    """

    @staticmethod
    def forward(compute, *tensors):
        # What is autocast where the gradient is asked for would round the float32 sums.
        with torch.autocast(tensors[0].device.type, enabled=False):
            return compute(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def _gradients(options: Options, d_out: torch.Tensor, *tensors: torch.Tensor | None) -> tuple:
    """Of q, k, v, weight and bias."""
    saved = Saved(*tensors)
    q, k, v, block_map, sparse, lse, *_ = saved
    gradients = sparse_attention_backward(
        q, k, v, sparse, lse, d_out, block_map, *options[2:]
    )  # fmt: skip
    if saved.weight is None:
        return *gradients, None, None
    branch = _branch(options, saved)
    d_weight, d_bias = linear_attention_backward(
        q, k, v, branch, d_out, gradients, options.backend
    )  # fmt: skip
    return *gradients, d_weight.to(saved.weight.dtype), d_bias.to(saved.bias.dtype)


def _tangent(options: Options, *tensors: torch.Tensor | None) -> torch.Tensor:
    """Of the result, from tangents of q, k, v, weight and bias."""
    tangents, saved = tensors[:5], Saved(*tensors[5:])
    q, k, v, block_map, sparse, lse, *_ = saved
    t_sparse = sparse_attention_jvp(
        q, k, v, sparse, lse, *tangents[:3], block_map, *options[2:]
    )  # fmt: skip
    if saved.weight is None:
        return t_sparse
    branch = _branch(options, saved)
    return linear_attention_jvp(q, k, v, branch, tangents, options.backend).add_(t_sparse)


def _branch(options: Options, saved: Saved) -> LinearBranch:
    return LinearBranch(*saved[6:], options.feature_map)
