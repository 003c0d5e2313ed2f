"""Where autograd records a graph: kernels and INT8 have no gradients, torch's own float ops do."""

import torch

GRADIENTS = "gradients are asked for"


def records_graph(module: torch.nn.Module, *tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what `module` makes of `tensors`.

    It does for the sake of one of them, a parameter, or what the host adds to a weight at each use:
    that may be a LoRA in training.
    """
    if not torch.is_grad_enabled():  # so it is wherever the host samples
        return False
    sources = (*tensors, *module.parameters())
    return any(x is not None and x.requires_grad for x in sources) or any(
        getattr(op, "weight_function", ()) or getattr(op, "bias_function", ())
        for op in module.modules()
    )
