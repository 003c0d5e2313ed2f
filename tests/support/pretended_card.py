"""Lets kernels be launched without a GPU, as on any card: they are compiled at most, never run.

For a process of its own that imports this before anything else of the pack's kernels: Triton's
interpreter must be off, and what is pretended here stays.
"""

import contextlib
import types
from collections.abc import Callable, Iterator
from unittest import mock

import pack  # noqa: F401
import torch
from turbodiffusion_pack.kernels import dispatch, driver, nvrtc

Card = tuple[int, int]

tensor_map = nvrtc.tensor_map  # the real one, which `pretended` replaces

_card: Card = 0, 0
_has_nvrtc = False

# Before the other modules take them from there.
dispatch.capability = lambda device: _card
dispatch.triton_unavailable = lambda device: None
nvrtc.unavailable = lambda: None if _has_nvrtc else "nothing is compiled here"


@contextlib.contextmanager
def pretended(card: Card, has_nvrtc: bool = False) -> Iterator[None]:
    """Tensors on the CPU are taken for tensors on a GPU of this compute capability, meanwhile.

    With `has_nvrtc` the pack's CUDA kernels stand in for Triton's where they do on that card;
    nothing compiles them here.
    """
    global _card, _has_nvrtc
    _card, _has_nvrtc = card, has_nvrtc
    _let_triton_compile_for(card)
    with (
        mock.patch.object(nvrtc, "version", lambda: (99, 0)),
        mock.patch.object(nvrtc, "target_of", lambda card, device: "sm_{}{}".format(*card)),
        mock.patch.object(nvrtc, "load", lambda *_, **__: mock.Mock()),
        mock.patch.object(nvrtc, "address", lambda x: 0),
        mock.patch.object(nvrtc, "tensor_map", lambda *_: nvrtc.TENSOR_MAP()),
    ):
        yield


@contextlib.contextmanager
def launched_by(library, load: Callable) -> Iterator[None]:
    """In a pretended card: launches and tensor maps reach `library` as a GPU's driver, meanwhile,
    with tensors' real addresses, and `load` stands in for nvrtc.load."""
    stubs = (
        mock.patch.object(nvrtc, "load", load),
        mock.patch.object(nvrtc, "address", lambda x: 0 if x is None else x.data_ptr()),
        mock.patch.object(nvrtc, "tensor_map", tensor_map),
        mock.patch.object(nvrtc, "driver", lambda: library),
        mock.patch.object(driver, "driver", lambda: library),
        mock.patch.object(driver, "_stream_on", lambda device: 0),
        mock.patch.object(driver, "_current_device", lambda: 0),
        mock.patch.object(torch.Tensor, "get_device", lambda x: 0),
    )
    with contextlib.ExitStack() as stack:
        for stub in stubs:
            stack.enter_context(stub)
        yield


def _let_triton_compile_for(card: Card) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    number = 10 * card[0] + card[1]
    triton.runtime.driver.set_active(
        types.SimpleNamespace(
            get_current_device=lambda: number,  # Triton keeps what is compiled by device
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", number, 32),
        )
    )
