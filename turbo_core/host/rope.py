"""The host's rotation, which depends on the video's shape alone: made once in a sampler run.

The host makes it anew in each pass, by some 80 small operations that the GPU waits for.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from comfy.ldm.flux.layers import EmbedND

from . import per_run
from .patch_owner import has_own, is_stock
from .versions import unrecorded

PLAIN = (type(None), bool, int, float, str, torch.device, torch.dtype)  # what compares by ==


@contextlib.contextmanager
def kept_rotation(wan: torch.nn.Module) -> Iterator[None]:
    """Meanwhile the passes of `wan` in a run share their rotation, unless somebody patched it.

    Not by an object patch: one on the model itself would hold it, and let it go only when Python
    collects garbage.
    """
    embedder = wan.rope_embedder
    stock = has_own(wan, "rope_encode") and type(embedder) is EmbedND and is_stock(embedder)
    if not stock or per_run.current() is None:
        yield
        return
    wan.rope_encode = functools.partial(_rope_encode, wan)
    try:
        yield
    finally:
        del wan.rope_encode


def _rope_encode(wan, *sizes, transformer_options: dict | None = None, **named) -> torch.Tensor:
    """WanModel.rope_encode, [1, L, 1, D/2, 2, 2] float32; in a run the last one again, if it is of
    the same sizes, device, dtype and `rope_options`.

    Where the host tells it tensors, as those of SCAIL's pose, it is made anew.
    """
    options = transformer_options or {}
    rope_options = dict(options.get("rope_options") or {})
    told = *sizes, *named.values(), *rope_options.values()

    def make():
        return type(wan).rope_encode(wan, *sizes, transformer_options=options, **named)

    run = None if torch.compiler.is_compiling() else per_run.current()
    # What captures a graph keeps nothing.
    if run is None or not all(isinstance(x, PLAIN) for x in told):
        return make()
    key = wan, sizes, named, rope_options
    if run.rotation is None or run.rotation[0] != key:
        with unrecorded():
            run.rotation = key, make()
    return run.rotation[1]
