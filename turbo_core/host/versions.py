"""All that differs between versions of ComfyUI, from 0.3.75 on; to drop an old one, delete here.

The rest of the pack is written against the newest.
"""

import contextlib
import inspect

import comfy.ops
import torch

try:
    from comfy.model_prefetch import pause_malloc_graph  # 0.35
except ImportError:  # an older host, which records nothing
    pause_malloc_graph = contextlib.nullcontext


def unrecorded() -> contextlib.AbstractContextManager:
    """A context whose allocations ComfyUI's compiler (0.35) leaves out of its plan; no nesting.

    It records what a model allocates in one forward pass and replays that plan in the next. Kernels
    that are compiled and loaded at their first use, and what `once` keeps from one block to the
    next, do not come again, and would break the plan.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return pause_malloc_graph()


# What cast_bias_weight is asked for, so that an INT8 weight is INT8 again after a patch: 0.33.
_known = inspect.signature(comfy.ops.cast_bias_weight).parameters
REQUANTIZED = {"want_requant": True} if "want_requant" in _known else {}
