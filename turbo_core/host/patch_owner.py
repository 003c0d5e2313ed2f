"""Whose a module's forward is: the class's own, this pack's, or another node's."""

from collections.abc import Callable

import torch


def mark_as_ours(forward: Callable) -> Callable:
    """The same function, which `is_ours` tells from other people's from now on."""
    forward.turbodiffusion = True
    return forward


def is_ours(forward: object) -> bool:
    """Whether this function is one that this pack put there."""
    return getattr(forward, "turbodiffusion", False)


def is_stock(module: torch.nn.Module) -> bool:
    """Whether nobody patched or hooked the module's forward."""
    # An unpatched module keeps its own bound method as an attribute.
    forward = vars(module).get("forward")
    stock = forward is None or getattr(forward, "__func__", None) is type(module).forward
    return stock and not module._forward_hooks and not module._forward_pre_hooks


def owner_of(forward: object) -> str:
    """The Python module that a patch comes from, for messages."""
    return getattr(forward, "__module__", "another node")
