"""Keys and values of the text, which depend on the prompt alone: made once in a sampler run.

Where weights are streamed, those of the layers that make them then come over once as well.
"""

import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from . import per_run
from .options import SPLIT, TIMESTEP
from .patch_owner import is_stock

PROMPTS = 2  # that are kept: with and without the prompt, where the host runs them apart
# Up to so many keys, attention to one in place of a prompt's padding is faster than to all of 512.
MOST_KEYS = 256


class KeysValues(dict):
    """Keys and values [B, T, C] of one text, by the index of the block that made them.

    The last of the T rows stands for `repeats` equal ones.
    In `room` [blocks, 2, B, T, C], where there is one, from before the first block runs: they stay,
    and would else come to lie between activations, in the way of others as large as those.
    """

    def __init__(self, room: torch.Tensor | None = None, repeats: int = 1):
        super().__init__()
        self.room, self.repeats = room, repeats

    def keep(self, block: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.room is not None and self.room.shape[2:] == k.shape:
            k, v = (place.copy_(x) for place, x in zip(self.room[block], (k, v), strict=True))
        self[block] = k, v


def keys_values(
    network: torch.nn.Module, context: torch.Tensor, dtype: torch.dtype, fused: bool
) -> KeysValues:
    """What the blocks of `network` have made of the text `context` [B, T, C] in this run, to look
    up and to add to; empty for a new text, and outside of a run. `fused` says whether they will
    make anything, in `dtype`.

    Texts are the same if all their numbers are: the host makes the tensor anew in each step. Only
    one network's are kept, as the experts of a model take turns once.
    """
    run = per_run.current()
    if run is None:
        return KeysValues()
    run.texts = [entry for entry in run.texts if entry[0] is network]
    for _, text, made in run.texts:
        if text.dtype == context.dtype and torch.equal(text, context):
            run.knew_text = True
            return made
    run.knew_text = False
    del run.texts[: -(PROMPTS - 1)]  # before there is room for another
    batch, length, _ = context.shape
    repeats = _repeats(context) if fused else 1
    shape = len(network.blocks), 2, batch, length - repeats + 1, network.dim
    made = KeysValues(context.new_empty(shape, dtype=dtype) if fused else None, repeats)
    run.texts.append((network, context, made))
    return made


def _repeats(context: torch.Tensor) -> int:
    """How many rows at the end of a text [B, T, C] are alike in each sample, as padding is.

    1 where that would leave more than MOST_KEYS.
    """
    alike = (context == context[:, -1:]).all(-1).all(0)  # [T]
    repeats = max(1, int(alike.flip(0).long().cumprod(0).sum()))  # NaN does not equal itself
    return repeats if context.shape[1] - repeats < MOST_KEYS else 1


def will_be_known(network: torch.nn.Module) -> bool:
    """Whether the last pass of this run knew its text: then one of the same `network` needs no room
    for it, and may compare later, for which the GPU has to be done with what came before."""
    run = per_run.current()
    return run is not None and run.knew_text and run.texts[-1][0] is network


def may_change(executor: WrapperExecutor, transformer_options: dict) -> bool:
    """Whether somebody else may change the text between the DIFFUSION_MODEL wrapper that `executor`
    is given to and the blocks: in each step otherwise perhaps, so that none is to be kept."""
    wan, behind = executor.class_obj, executor.wrappers[executor.idx + 1 :]
    wrappers = transformer_options.get("wrappers", {}).get(WrappersMP.DIFFUSION_MODEL, {})
    ours = [wrapper for key in (SPLIT, TIMESTEP) for wrapper in wrappers.get(key, ())]
    return bool(
        any(wrapper not in ours for wrapper in behind)
        or transformer_options.get("patches_replace", {}).get("dit")
        or any(_is_replaced(wan, name) for name in ("_forward", "forward_orig"))
        or not all(map(is_stock, wan.text_embedding.modules()))
    )


def _is_replaced(wan: torch.nn.Module, name: str) -> bool:
    # As in `is_stock`, the own method may be an attribute as well.
    method = vars(wan).get(name)
    return method is not None and getattr(method, "__func__", None) is not getattr(type(wan), name)
