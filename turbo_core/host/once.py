"""What all blocks of one forward pass need alike, such as the rotation, is made once for them."""

from collections.abc import Callable

import torch

from .options import MADE_ONCE


def once(transformer_options: dict, name: str, x: torch.Tensor, make: Callable):
    """make(x), once for all blocks of a forward pass that get the same x, which nobody changes."""
    made = transformer_options.get(MADE_ONCE, {})
    if name not in made or made[name][0] is not x:
        made[name] = x, make(x)
    return made[name][1]
