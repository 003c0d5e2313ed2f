"""Where somebody differentiates: the fused block and INT8 have no gradients, SLA in 16 bits has."""

import torch

from ...kernels.derivatives import asked_for

GRADIENTS = "gradients are asked for"


def records_graph(module: torch.nn.Module, *tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what `module` makes of `tensors`, or forward mode differentiates it.

    It does for the sake of one of them, a parameter, or what the host adds to a weight at each use:
    that may be a LoRA in training.
    """
    if asked_for(*tensors):
        return True
    if not torch.is_grad_enabled():  # so it is wherever the host samples
        return False
    return any(x.requires_grad for x in module.parameters()) or any(
        getattr(op, "weight_function", ()) or getattr(op, "bias_function", ())
        for op in module.modules()
    )
