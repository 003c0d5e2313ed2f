"""The host's rotation, which depends on the video's shape alone: made once in a sampler run.

The host makes it anew in each pass, by some 80 small operations that the GPU waits for.
"""

import torch
from comfy.ldm.flux.layers import EmbedND

from . import per_run
from .patch_owner import is_stock
from .versions import unrecorded


def rope_encode(wan, *sizes, transformer_options: dict | None = None, **named) -> torch.Tensor:
    """WanModel.rope_encode, [1, L, 1, D/2, 2, 2] float32; in a run the last one again, if it is of
    the same sizes, device, dtype and `rope_options`."""
    options = transformer_options or {}

    def make():
        return type(wan).rope_encode(wan, *sizes, transformer_options=options, **named)

    run = None if torch.compiler.is_compiling() else per_run.current()
    embedder = wan.rope_embedder
    if run is None or type(embedder) is not EmbedND or not is_stock(embedder):
        return make()
    key = wan, embedder, sizes, named, dict(options.get("rope_options") or {})
    if run.rotation is None or run.rotation[0] != key:
        with unrecorded():
            run.rotation = key, make()
    return run.rotation[1]
