"""Gradients of one batch: their norm, and none of them where one is not finite."""

from collections.abc import Iterable

import torch


def norm_or_nothing(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
    """Norm of all gradients together; if it is not finite, all of them become zero.

    Nothing waits for the GPU: the norm stays there, and the report finds the bad batch in it. With
    sharded parameters the norm is that of all processes, so all of them drop the same batch. (TD
    zeroes single numbers, which leaves the rest of a broken gradient in.)

    Returns:
        float32 [], not finite if the batch was dropped.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    finite = norm.isfinite()
    for gradient in gradients:
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        local.masked_fill_(~finite, 0.0)
    return norm
