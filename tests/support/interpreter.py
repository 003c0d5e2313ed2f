"""Makes Triton's interpreter fast enough for the kernels' own functions and reductions."""

import dataclasses
import importlib.util
import math

import numpy as np


def speed_up() -> None:
    """Take the ways that the interpreter has for what Triton itself calls, for our kernels too."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    _reduce_by_numpy(interpreter)
    _patch_once_a_launch(interpreter)
    _leave_out_checks_that_nobody_reads(interpreter)
    _look_numpy_types_up(interpreter)
    _look_block_types_up(interpreter)
    _look_shapes_up(interpreter)


def _reduce_by_numpy(interpreter) -> None:
    """Let numpy take the maximum that the kernels take with `largest`.

    The interpreter knows Triton's own reductions; through any other it goes element by element.
    """
    apply_impl = interpreter.ReduceOps.apply_impl

    def apply(self, inputs):
        if getattr(self.combine_fn, "__name__", None) == "larger":
            return self.min_max(inputs[0], val_reduce_op=np.max)
        return apply_impl(self, inputs)

    interpreter.ReduceOps.apply_impl = apply


def _patch_once_a_launch(interpreter) -> None:
    """Patch triton.language once a launch for each module that functions of it are in.

    The interpreter does so at every call of every function, a third of its time.
    """
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_lang(fn):
        if id(fn.__globals__) in patched:
            return None  # to a function that is called within a kernel, which ignores it
        patched.add(id(fn.__globals__))
        return patch(fn)

    def launch_anew(self, *args, **kwargs):
        patched.clear()  # the launch before took its patches back
        return launch(self, *args, **kwargs)

    interpreter._patch_lang = patch_lang
    interpreter.GridExecutor.__call__ = launch_anew


def _leave_out_checks_that_nobody_reads(interpreter) -> None:
    """Integer arithmetic is done again in int64 and compared, for an assertion that only `debug`
    makes, which the interpreter has not: half of the time of kernels that take row by row."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _look_numpy_types_up(interpreter) -> None:
    """The interpreter makes its table of numpy's types anew at each look into it."""
    of_type, known = interpreter._get_np_dtype, {}

    def look_up(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = of_type(dtype.scalar)
        return known[name]

    interpreter._get_np_dtype = look_up


def _look_block_types_up(interpreter) -> None:
    """The interpreter makes the type of a block anew for every tensor."""
    language, known = interpreter.tl, {}
    block_type = language.block_type

    def look_up(scalar, shape):
        key = scalar.name, *shape
        if key not in known:
            known[key] = block_type(scalar, shape)
        return known[key]

    block_type.with_element_ty = lambda self, scalar: look_up(scalar, self.shape)
    interpreter.InterpreterBuilder.get_block_ty = lambda self, scalar, shape: look_up(scalar, shape)


def _look_shapes_up(interpreter) -> None:
    """A tensor makes the numbers of its shape anew."""
    core, known = interpreter.tl.core, {}

    def start(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = tuple(type.shape) if type.is_block() else ()
        if shape not in known:
            numbers = core.tuple([core.constexpr(size) for size in shape])
            known[shape] = numbers, core.constexpr(math.prod(shape))
        self.shape, self.numel = known[shape]

    core.tensor.__init__ = start
