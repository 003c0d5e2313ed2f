"""Runs the pack as on an older card, on the GPU there is.

    --card 8.9    of pytest and of the benchmarks

Triton makes code for the older card, of its instructions (mma.sync, no TMA), which is assembled for
this GPU; NVRTC makes PTX for it, of which the driver makes machine code. Kernels of torch and of
other packages stay this GPU's own.
"""

import argparse
import functools
import importlib
import re
import sys

import pack  # noqa: F401
import torch
from turbodiffusion_pack.kernels import ceilings, dispatch, nvrtc

# Ampere has neither TMA nor fp8, Ada no TMA, and Hopper's own kernels need NVRTC.
AMPERE, ADA, HOPPER = (8, 6), (8, 9), (9, 0)
# What can be played, with the shared memory that a block may use there, in bytes.
PLAYED = {(8, 0): 166912, (8, 6): 101376, (8, 9): 101376}

Card = tuple[int, int]


def pretend(monkeypatch, card: Card) -> None:
    """Choose as on `card` from here on: without NVRTC, and without TMA and fp8 where it has none.

    Triton still makes code for the GPU there is.
    """
    _decide_as(monkeypatch.setattr, card)
    monkeypatch.setattr(nvrtc, "unavailable", lambda: "it is switched off")
    monkeypatch.setattr(nvrtc, "load", _refuse)
    if card < HOPPER:
        from triton.tools.tensor_descriptor import TensorDescriptor

        monkeypatch.setattr(TensorDescriptor, "from_tensor", _refuse)


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None
) -> argparse.Namespace:
    """`parser.parse_args(arguments)` with an option --card; the card is played from here on."""
    options = parse_for_a_server(parser, arguments)
    if options.card:
        play(options.card)
    return options


def parse_for_a_server(
    parser: argparse.ArgumentParser, arguments: list[str] | None = None
) -> argparse.Namespace:
    """The same, for a ComfyServer to play: here it is only checked that it can be."""
    parser.add_argument("--card", help="run our kernels as on an older card: 8.0, 8.6 or 8.9")
    options = parser.parse_args(arguments)
    if options.card:
        _check_playable(options.card)
    return options


def play(name: str) -> None:
    """Run this process as on the card `name` ("8.0", "8.6" or "8.9"), Triton and CUDA C++ alike.

    To be called before a kernel is launched.

    Raises:
        SystemExit: this GPU cannot play that card; one sentence says why.
    """
    _check_playable(name)
    card, real = _card(name), torch.cuda.get_device_capability()
    _decide_as(setattr, card)
    _fit_cuda(PLAYED[card])
    if card != real:
        _let_triton_compile_for(card, real)


def _check_playable(name: str) -> None:
    if problem := unplayable(name):
        sys.exit(f"--card {name}: {problem}")


def unplayable(name: str) -> str | None:
    """Why this GPU cannot play the card `name`; None where it can."""
    if not torch.cuda.is_available():
        return "there is no GPU to play an older card, and Triton's interpreter knows no cards"
    card, real = _card(name), torch.cuda.get_device_capability()
    if card and card > real:
        return f"this GPU is sm_{real[0]}{real[1]}, and code for a newer card does not run on it"
    if card not in PLAYED:
        played = ", ".join(f"{major}.{minor}" for major, minor in PLAYED)
        return f"the cards that can be played are {played}"
    return None


def playing() -> str | None:
    """What a benchmark says of the card that it plays; None where it is this GPU itself."""
    card, real = dispatch.capability(torch.device("cuda", 0)), torch.cuda.get_device_capability()
    if card == real:
        return None
    text = f"as sm_{card[0]}{card[1]}; kernels of torch and other packages are this GPU's own"
    if missing := set(ceilings.products_of(card)) - set(ceilings.products_of(real)):
        text += (
            f"; its products of {', '.join(sorted(missing))} are emulated here by those of fp16: "
            "they say nothing of that card's speed"
        )
    return text


def _card(name: str) -> Card | None:
    """(8, 9) of "8.9", None of what is no such name."""
    found = re.fullmatch(r"(\d+)\.(\d)", name)
    return found and (int(found[1]), int(found[2]))


def _decide_as(set_attribute, card: Card) -> None:
    """Every module of the kernels takes any device for `card`."""
    played = functools.cache(lambda device: card)
    for kernels in _loaded_kernels():
        real = sys.modules[kernels + ".dispatch"].capability
        for name, module in list(sys.modules.items()):
            if name.startswith(kernels) and getattr(module, "capability", None) is real:
                set_attribute(module, "capability", played)


def _loaded_kernels() -> list[str]:
    """What the pack's kernels are called: ComfyUI has the pack under a name of its own."""
    return [n.removesuffix(".dispatch") for n in sys.modules if n.endswith(".kernels.dispatch")]


def _fit_cuda(limit: int) -> None:
    """Refuse kernels of CUDA C++ that have more shared memory than the card."""

    def fitting(load, source, name, target, shared_bytes, *rest, **constants):
        assert shared_bytes <= limit, f"{name} takes {shared_bytes} bytes of {limit}"
        return load(source, name, target, shared_bytes, *rest, **constants)

    for kernels in _loaded_kernels():
        nvrtc = importlib.import_module(f"{kernels}.nvrtc")
        nvrtc.load = functools.partial(fitting, nvrtc.load)


def _let_triton_compile_for(card: Card, real: Card) -> None:
    """Triton makes PTX for `card`, and machine code of it for `real`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.backends.nvidia.driver import CudaDriver
    from triton.compiler import compiler

    number, real_number = (10 * major + minor for major, minor in (card, real))
    assemble = CUDABackend.make_cubin
    CUDABackend.make_cubin = lambda self, src, metadata, options, capability: assemble(
        self, src, metadata, options, real_number
    )
    CudaDriver.get_current_target = lambda self: GPUTarget("cuda", number, 32)
    compiler.max_shared_mem = lambda device: PLAYED[card]
    # What is kept on disk under that card's name is no code for that card.
    triton.knobs.cache.dir += f"-sm_{number}-on-sm_{real_number}"


def _refuse(*_, **__):
    raise AssertionError("this is switched off")
