"""Lets the pack believe that it runs on another card: what that one lacks stays switched off."""

import sys

from turbodiffusion_pack.kernels import dispatch, nvrtc

PACK = "turbodiffusion_pack.kernels"
# Ampere has neither TMA nor fp8, Ada no TMA, and Hopper's own kernels need NVRTC.
AMPERE, ADA, HOPPER = (8, 6), (8, 9), (9, 0)


def pretend(monkeypatch, card: tuple[int, int]) -> None:
    """Run as on `card` from here on: without NVRTC, and without TMA and fp8 where it has none."""
    real = dispatch.capability
    for name, module in list(sys.modules.items()):
        if name.startswith(PACK) and getattr(module, "capability", None) is real:
            monkeypatch.setattr(module, "capability", lambda device: card)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "it is switched off")
    monkeypatch.setattr(nvrtc, "load", _refuse)
    if card < HOPPER:
        from triton.tools.tensor_descriptor import TensorDescriptor

        monkeypatch.setattr(TensorDescriptor, "from_tensor", _refuse)


def _refuse(*_, **__):
    raise AssertionError("this is switched off")
