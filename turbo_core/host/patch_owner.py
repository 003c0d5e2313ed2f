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
    if is_hooked(module):
        return False
    return "forward" not in vars(module) or has_own(module, "forward")


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether somebody is called before or after the module's forward."""
    own = vars(module)
    return bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


def has_own(module: torch.nn.Module, method: str) -> bool:
    """Whether this method of the module is its class's."""
    # One that is unpatched again keeps its own bound method as an attribute.
    found = vars(module).get(method)
    return found is None or getattr(found, "__func__", None) is getattr(type(module), method)


def owner_of(forward: object) -> str:
    """The Python module that a patch comes from, for messages."""
    return getattr(forward, "__module__", "another node")
