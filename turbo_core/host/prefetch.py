"""Weights that arrive before they are needed: a block ahead, by the host's own queue.

With dynamic VRAM the host has one, which its Wan model does not use; without, it streams one layer
ahead by itself, which hides all but the text's layers (see text.py).
"""

import torch

from .arrivals import bytes_of, waiting
from .options import PREFETCH, TEXT
from .patch_owner import is_ours
from .versions import make_prefetch_queue, prefetch_queue_pop


def queue_of(wan: torch.nn.Module, device: torch.device, transformer_options: dict) -> list | None:
    """The host's queue for one forward pass through the blocks of `wan`, None where it has none.

    Each entry is what one block fetches: without the text's layers where those have run.
    """
    if not transformer_options.get("prefetch_dynamic_vbars"):
        return None
    left_out = transformer_options.get("patches_replace", {}).get("dit")
    if left_out or not all(is_ours(block.forward) for block in wan.blocks):
        return None  # it might get out of step with the blocks
    made = transformer_options[TEXT]
    entries = [_streamed(block, index in made) for index, block in enumerate(wan.blocks)]
    return make_prefetch_queue(entries, device, transformer_options)


def _streamed(block: torch.nn.Module, has_text: bool) -> list[torch.nn.Module]:
    """The ops of `block` that the host may have to bring to the GPU."""
    left_out = [block.cross_attn.k, block.cross_attn.v] if has_text else []
    return [op for op in block.modules() if hasattr(op, "_v") and op not in left_out]


def next_block(transformer_options: dict, block: torch.nn.Module | None, device) -> None:
    """`block` is about to run, None where the pass is over: the host brings its weights, while the
    GPU computes what was asked of it before.

    Another node may have left blocks out of the pass, or run it twice.
    """
    queue = transformer_options.get(PREFETCH)
    if queue is None or len(queue) < 2:
        return
    if block is None:
        del queue[1:-1]  # nobody would let go of what came now
    with waiting(device) as wait:
        prefetch_queue_pop(queue, device, block)
        coming = queue[0][1][1] if queue and queue[0] else ()
        wait.size = sum(bytes_of(op) for op in coming if not op._prefetch["resident"])
