"""Values on their way to other processes, with what is large apart: tensors go through the group.

A node pack has another name in each process, so what it defines is told by its name within it.
Nothing else is trusted to mean the same elsewhere than what torch, ComfyUI and Python define.
"""

import io
import pickle
import sys
from types import FunctionType

import torch

PACKAGE = __name__.removesuffix(".turbo_core.parallel.parcels")
KNOWN = sys.stdlib_module_names | {"comfy", "torch"}


class UnsendableError(ValueError):
    """A value that another process could not make sense of; the message says which part of it."""


def wrap(value: object) -> tuple[bytes, list[torch.Tensor]]:
    """A value as bytes, and the tensors in it.

    Raises:
        UnsendableError: part of it is known to this process only.
    """
    tensors, data = [], io.BytesIO()
    try:
        _Wrapper(data, tensors).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UnsendableError(str(error)) from error
    return data.getvalue(), tensors


def unwrap(data: bytes, tensors: list[torch.Tensor]) -> object:
    """What `wrap` took apart in another process, with `tensors` in the place of those in it."""
    return _Unwrapper(io.BytesIO(data), tensors).load()


class _Wrapper(pickle.Pickler):
    def __init__(self, file, tensors: list[torch.Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, part):
        if isinstance(part, torch.Tensor):
            if type(part) not in (torch.Tensor, torch.nn.Parameter):
                raise UnsendableError(f"a {type(part).__name__} does not travel")
            self.tensors.append(part.detach())
            return len(self.tensors) - 1
        if not isinstance(part, (type, FunctionType)):
            return None
        if part.__module__.startswith(f"{PACKAGE}."):
            return part.__module__.removeprefix(PACKAGE), part.__qualname__
        if part.__module__.split(".")[0] not in KNOWN:
            raise UnsendableError(f"{part.__qualname__} of {part.__module__} is unknown elsewhere")
        return None


class _Unwrapper(pickle.Unpickler):
    def __init__(self, file, tensors: list[torch.Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, told):
        if isinstance(told, int):
            return self.tensors[told]
        module, name = told
        return self.find_class(PACKAGE + module, name)
