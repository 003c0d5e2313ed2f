"""Keys and values of the text, which depend on the prompt alone: made once in a sampler run.

Where weights are streamed, those of the layers that make them then come over once as well.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import torch

KeysValues = dict[int, tuple[torch.Tensor, torch.Tensor]]  # block -> k and v [B, T, C]

PROMPTS = 2  # that are kept: with and without the prompt, where the host runs them apart

_kept = contextvars.ContextVar("turbodiffusion_text", default=None)


@contextlib.contextmanager
def kept_for_a_run(wanted: bool = True) -> Iterator[None]:
    """Until the end of this context the keys and values of its prompts are kept, if `wanted`.

    Inside another run they are kept as long as that one lasts.
    """
    if not wanted or _kept.get() is not None:
        yield
        return
    token = _kept.set([])
    try:
        yield
    finally:
        _kept.reset(token)


def keys_values(network: torch.nn.Module, context: torch.Tensor) -> KeysValues:
    """What the blocks of `network` have made of the text `context` [B, T, C] in this run, to look
    up and to add to; empty for a new text, and outside of a run.

    Texts are the same if all their numbers are: the host makes the tensor anew in each step. Only
    one network's are kept, as the experts of a model take turns once.
    """
    kept = _kept.get()
    if kept is None or _is_captured(context):
        return {}
    kept[:] = [entry for entry in kept if entry[0] is network]
    for _, text, made in kept:
        if text.dtype == context.dtype and torch.equal(text, context):
            return made
    made = {}
    kept[:] = [*kept[1 - PROMPTS :], (network, context, made)]
    return made


def _is_captured(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is recorded, in which nobody may look at numbers."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
