"""Work on a GPU that is recorded once as a CUDA graph, and replayed from then on.

A toy's step is thousands of kernels so small that Python launches them slower than the GPU runs
them. A graph repeats them on the same memory, at the GPU's pace.
"""

from collections.abc import Callable

import torch

from .presets import Preset
from .processes import grouped
from .slots import Values

Given = torch.Tensor | None
WARM_UPS = 3  # runs before it is recorded: kernels are compiled, tuned and loaded in them


def wanted(preset: Preset, device: torch.device) -> bool:
    """Whether passes of training are replayed as CUDA graphs."""
    return preset.recorded and device.type == "cuda" and not grouped()


class Recorded:
    """work(*tensors), which gives a list of tensors, as a graph.

    Args:
        work: computes on the GPU alone: it waits for nothing, draws no random numbers, and makes
            the same of the same. Its tensors keep their shapes from call to call. Host code may
            count on the CPU what it then copies (torch.arange in the time embedding), which no
            graph can hold: told a device, torch counts there.
    """

    def __init__(self, work: Callable[..., list[torch.Tensor]]):
        self.work, self.graph = work, None

    def __call__(self, *given: Given) -> list[torch.Tensor]:
        """The results, which the next call overwrites."""
        if self.graph is None:
            self._record(given)
        for own, tensor in zip(self.inputs, given, strict=True):
            if own is not None:
                own.copy_(tensor)
        self.graph.replay()
        return self.outputs

    def _record(self, given: tuple[Given, ...]) -> None:
        device = next(tensor.device for tensor in given if tensor is not None)
        self.inputs = [None if tensor is None else tensor.clone() for tensor in given]
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), device:
            for _ in range(WARM_UPS):
                self.work(*self.inputs)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.outputs = self.work(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)


class Backward:
    """Gradients of a loss for the weights that it is to teach.

    Args:
        loss_of: of tensors (or None, where one is left out) the loss, with its graph, and what to
            tell by name.
        weights: what learns.
        recorded: whether as a CUDA graph, see Recorded.
    """

    def __init__(
        self,
        loss_of: Callable[..., tuple[torch.Tensor, Values]],
        weights: list[torch.Tensor],
        recorded: bool = False,
    ):
        self.loss_of, self.weights = loss_of, weights
        self.graph = Recorded(self._gradients) if recorded else None

    def __call__(self, share: float, *given: Given) -> Values:
        """Add `share` times the gradients to the weights'; what the loss tells."""
        if self.graph is None:
            loss, values = self.loss_of(*given)
            (share * loss).backward()
            return values
        found = self.graph(*given)
        told = dict(zip(self.names, found, strict=False))
        self._add(torch._foreach_mul(found[len(told) :], share))
        return {name: value.clone() for name, value in told.items()}

    def _gradients(self, *given: Given) -> list[torch.Tensor]:
        loss, values = self.loss_of(*given)
        gradients = torch.autograd.grad(loss, self.weights, allow_unused=True)
        pairs = [p for p in zip(self.weights, gradients, strict=True) if p[1] is not None]
        self.taught, self.names = [weight for weight, _ in pairs], list(values)
        return [*values.values(), *(_laid_out_as(*pair) for pair in pairs)]

    def _add(self, gradients: list[torch.Tensor]) -> None:
        pairs = list(zip(self.taught, gradients, strict=True))
        there = [(weight.grad, gradient) for weight, gradient in pairs if weight.grad is not None]
        if there:
            torch._foreach_add_(*map(list, zip(*there, strict=True)))
        for weight, gradient in pairs:
            weight.grad = gradient if weight.grad is None else weight.grad


def _laid_out_as(weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient with its weight's strides, as backward() gives it: fused AdamW goes by memory.

    A convolution's may have channels last.
    """
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)
