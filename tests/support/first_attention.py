"""The first attention of a process, for processes of their own, see fresh_process.py."""

import pack  # noqa: F401
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from turbodiffusion_pack.turbo_core.host.attention_order import settle

ORDER = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]  # as ComfyUI 0.33


def equals_the_second(settled: bool) -> bool:
    """Whether it has the bits of the next one, asked for in an order as ComfyUI does."""
    q, k, v = torch.randn(3, 1, 8, 512, 128, device="cuda", dtype=torch.bfloat16).unbind()
    if settled:
        settle(q.device)
    first, second = _attention(q, k, v), _attention(q, k, v)
    return torch.equal(first, second)


def _attention(q, k, v):
    with sdpa_kernel(ORDER, set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
