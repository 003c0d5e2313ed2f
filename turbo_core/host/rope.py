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
    the same sizes, device, dtype and `rope_options`."""
    options = transformer_options or {}

    def make():
        return type(wan).rope_encode(wan, *sizes, transformer_options=options, **named)

    run = None if torch.compiler.is_compiling() else per_run.current()
    if run is None:  # what captures a graph keeps nothing
        return make()
    key = wan, sizes, named, dict(options.get("rope_options") or {})
    if run.rotation is None or run.rotation[0] != key:
        with unrecorded():
            run.rotation = key, make()
    return run.rotation[1]
