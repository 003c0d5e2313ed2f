"""Whether somebody differentiates what an op computes: few kernels have gradients."""

import torch
from torch.autograd import forward_ad


def asked_for(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is made of `tensors`, or one has a tangent (forward mode)."""
    # As ComfyUI samples: neither is recorded. torch.compile traces no such question.
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        return False
    given = [x for x in tensors if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return True
    return any(map(has_tangent, given))


def no_gradients(*tensors: torch.Tensor | None) -> str | None:
    """Why kernels without gradients cannot take these tensors; None where they can."""
    return "gradients are asked for" if asked_for(*tensors) else None


def has_tangent(x: torch.Tensor) -> bool:
    """Whether forward mode pushes a tangent along with x; torch.compile traces none."""
    return not torch.compiler.is_compiling() and forward_ad.unpack_dual(x).tangent is not None
