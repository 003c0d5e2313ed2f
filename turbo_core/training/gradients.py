"""Gradients of one batch, whole or split by FSDP2."""

from collections.abc import Iterable

import torch


def gradient_norm(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Norm of all gradients together, float32 []; not finite where one of them is not.

    With sharded parameters it is that of all processes, the same in each.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def own(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that FSDP2 split, else the tensor; the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
