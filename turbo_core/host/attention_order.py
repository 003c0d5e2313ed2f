"""The order in which torch tries its kernels of attention, fixed before it counts."""

import functools

import torch


@functools.cache
def settle(device: torch.device) -> None:
    """Have torch choose that order now, once in a process.

    It does with the first attention that a GPU computes, and there overrides an order that the host
    asks for: on Hopper that one attention is cuDNN's, and the later ones of the same inputs, by
    another kernel, have other bits.
    """
    if device.type == "cuda":
        x = torch.zeros(1, 1, 1, 8, device=device)
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
