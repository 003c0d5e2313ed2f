"""What ComfyUI's compiler may not record of ours.

Since 0.35 it records what a model allocates in one forward pass and replays that plan in the next.
Kernels that are compiled and loaded at their first use, and what `once` keeps from one block to the
next, do not come again, and would break the plan.
"""

import contextlib

import torch

try:
    from comfy.model_prefetch import pause_malloc_graph
except ImportError:  # an older ComfyUI, which records nothing
    pause_malloc_graph = contextlib.nullcontext


def unrecorded() -> contextlib.AbstractContextManager:
    """A context whose allocations the host leaves out of its plan; it does not nest."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return pause_malloc_graph()
