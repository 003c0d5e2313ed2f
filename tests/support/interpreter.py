"""Makes Triton's interpreter fast enough for the kernels' own reductions."""

import importlib.util

import numpy as np


def speed_up() -> None:
    """Let numpy take the maximum that the kernels take with `largest`.

    The interpreter knows Triton's own reductions; through any other it goes element by element.
    """
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    apply_impl = interpreter.ReduceOps.apply_impl

    def apply(self, inputs):
        if getattr(self.combine_fn, "__name__", None) == "larger":
            return self.min_max(inputs[0], val_reduce_op=np.max)
        return apply_impl(self, inputs)

    interpreter.ReduceOps.apply_impl = apply
