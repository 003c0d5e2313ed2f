"""A LoRA on INT8 weights that are streamed: added once, not at each use.

ComfyUI adds it to a copy of the weight every time that one is fetched, and it is quantized again
every time. The sum is kept in RAM instead, in INT8 and as it multiplies, and streamed in place of
the weight, where there is room. With dynamic VRAM the host keeps the sums itself that it has room
for on the GPU.
"""

import weakref

import comfy.model_management
from comfy.model_patcher import LowVramPatch

from .weights import ram_allows


def stand_in(op, merge):
    """`op`, or where the host adds a LoRA to its INT8 weight at each use, an op with the sum.

    `merge()` makes that one. It is kept until `op` gets another LoRA.
    """
    if not op.weight_function:
        vars(op).pop("merged", None)
        return op
    if not all(isinstance(function, LowVramPatch) for function in op.weight_function):
        return op
    patches = [patch for f in op.weight_function for patch in f.patches[f.key]]
    kept, made_of = vars(op).get("merged", (None, ()))
    if kept is None or not _same(made_of, patches):
        vars(op).pop("merged", None)
        if not ram_allows(op.weight.numel()):
            return op
        kept = merge()
        if comfy.model_management.pin_memory(kept.weight):
            weakref.finalize(kept, _unpin, kept.weight).atexit = False
        vars(op)["merged"] = kept, patches
    kept.bias, kept.bias_function = op.bias, op.bias_function  # which may be others by now
    return kept


def _same(a: list, b: list) -> bool:
    """Whether these are the same objects: a LoRA's tensors are nothing to compare."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _unpin(weight) -> None:
    comfy.model_management.unpin_memory(weight)
