"""Every kernel in CUDA C++ as the host code launches it on a card, without that card.

A new .cu file gets a line in KERNELS.
"""

import ctypes
import functools
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ahead_of_time
import older_cards
import torch
from ahead_of_time import ADA, CARDS, HOPPER
from devices import DEVICE
from turbodiffusion_pack.kernels import ceilings, checks, dispatch, nvrtc
from turbodiffusion_pack.kernels.block_map import cuda as selection
from turbodiffusion_pack.kernels.block_map import mma as scores
from turbodiffusion_pack.kernels.block_map import select_blocks
from turbodiffusion_pack.kernels.checks import HEAD_DIMS
from turbodiffusion_pack.kernels.frames_conv import frames_conv
from turbodiffusion_pack.kernels.frames_conv import hopper as conv
from turbodiffusion_pack.kernels.int8_linear import hopper as linear
from turbodiffusion_pack.kernels.int8_linear import int8_linear, int8_linear_and_squares
from turbodiffusion_pack.kernels.int8_quant import hopper as rows
from turbodiffusion_pack.kernels.int8_quant import mma as mma_rows
from turbodiffusion_pack.kernels.int8_quant import quantize_rows
from turbodiffusion_pack.kernels.linear_attention import (
    LinearBranch,
    key_value_state,
    state_of_int8_keys,
)
from turbodiffusion_pack.kernels.linear_attention import hopper as hopper_state
from turbodiffusion_pack.kernels.linear_attention import mma as state
from turbodiffusion_pack.kernels.norm_quant import cuda as layer_norm
from turbodiffusion_pack.kernels.norm_quant import layer_norm_quant
from turbodiffusion_pack.kernels.qk_prepare import cuda as cuda_prepare
from turbodiffusion_pack.kernels.qk_prepare import prepare, prepare_keys
from turbodiffusion_pack.kernels.requantize import mma as weights
from turbodiffusion_pack.kernels.requantize import requantize_rows
from turbodiffusion_pack.kernels.sparse_attention import PV_DTYPES, sage_attention
from turbodiffusion_pack.kernels.sparse_attention import hopper as attention
from turbodiffusion_pack.kernels.sparse_attention import mma as mma_attention
from turbodiffusion_pack.kernels.text_attention import mma as text
from turbodiffusion_pack.kernels.text_attention import text_attention

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
DTYPES = torch.bfloat16, torch.float16

Card = tuple[int, int]


class Launch(NamedTuple):
    """One launch of the host code: what it loaded, and what it passed to the kernel."""

    source: Path
    name: str
    target: str
    shared_bytes: int
    constants: tuple[tuple[str, int], ...]
    threads: int
    operands: ctypes.Structure

    @property
    def built(self) -> tuple:
        """All that decides on the machine code."""
        return self.source, self.target, self.shared_bytes, type(self.operands), self.constants


class Built(NamedTuple):
    """One configuration of a kernel, compiled."""

    registers: int  # a thread starts with
    spilled: int  # bytes of a thread
    shared: int  # bytes of a block
    binary: bytes


def captured(monkeypatch, card: Card) -> list[Launch]:
    """The launches that `card` would get from here on; nothing is compiled or runs."""
    older_cards.pretend(monkeypatch, card)
    found = []

    def load(source, name, target, shared_bytes, operands, device, **constants):
        def launch(programs, threads, given):
            assert type(given) is operands
            flags = tuple(constants.items())
            found.append(Launch(source, name, target, shared_bytes, flags, threads, given))

        return types.SimpleNamespace(launch=launch)

    monkeypatch.setattr(nvrtc, "unavailable", lambda: None)
    monkeypatch.setattr(nvrtc, "load", load)
    monkeypatch.setattr(nvrtc, "target_of", lambda card, device: f"sm_{card[0]}{card[1]}")
    monkeypatch.setattr(nvrtc, "address", lambda x: 0 if x is None else x.data_ptr())
    monkeypatch.setattr(nvrtc, "tensor_map", noted_map)
    return found


def noted_map(x: torch.Tensor, box: int | tuple[int, ...], fetched: int = 128) -> ctypes.Array:
    """In place of a tensor map, what it is made of: address, box, and last what is fetched."""
    noted = nvrtc.TENSOR_MAP(x.data_ptr(), *(box if isinstance(box, tuple) else (box,)))
    noted[-1] = fetched
    return noted


@functools.cache
def built(*of: object) -> Built:
    """What Launch.built describes, compiled; needs no GPU."""
    source, target, shared_bytes, operands, constants = of
    binary = nvrtc.compile_file(source, target, shared_bytes, operands, **dict(constants))
    used = ahead_of_time.resources(binary)
    return Built(
        registers=used["registers"],
        spilled=used["stack"] + used["local"],
        shared=used["shared"] + shared_bytes,
        binary=binary,
    )


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def launch_prepare(dtype, block=128, **options):
    x, angles = zeros(1, 70, 1, 128, dtype=dtype), zeros(1, 70, 64)
    prepare(x, zeros(128), angles, angles, block=block, backend="triton", **options)


def launch_linear(dtype, granularity="rows", **options):
    x, w = zeros(1, 70, 128, dtype=torch.int8), zeros(128, 128, dtype=torch.int8)
    scales = {"rows": (zeros(1, 70), zeros(128)), "blocks": (zeros(1, 1, 1), zeros(1, 1))}
    x_scale, w_scale = scales[granularity]
    int8_linear(x, x_scale, w, w_scale, out_dtype=dtype, backend="triton", **options)


def launch_squares(dtype):
    x, w = zeros(1, 70, 128, dtype=torch.int8), zeros(128, 128, dtype=torch.int8)
    int8_linear_and_squares(x, zeros(1, 70), w, zeros(128), None, dtype, backend="triton")


def launch_attention(dtype, pv="fp8", head_dim=128):
    heads = zeros(1, 70, 1, head_dim, dtype=dtype)
    chosen = zeros(1, 1, 1, 2, dtype=torch.int32)
    sage_attention(heads, heads, heads, chosen, pv, backend="triton")


def every_prepare(card):
    branch = LinearBranch(zeros(1, 1, 128, 128), zeros(1, 1, 128), zeros(128, 128), zeros(128))
    for dtype in DTYPES:
        launch_prepare(dtype, quantize=True, branch=branch)
        launch_prepare(dtype, quantize=True)
        launch_prepare(dtype)
        launch_prepare(dtype, block=64)
        angles = zeros(1, 70, 64)
        k = zeros(1, 70, 1, 128, dtype=dtype)
        prepare_keys(k, zeros(128), angles, angles, backend="triton")


def every_linear(card):
    for dtype in DTYPES:
        launch_linear(dtype)


def every_linear_by_mma(card):
    # Each takes seconds to compile, and dtypes differ in a few instructions at the end.
    for dtype, granularity in zip(DTYPES, ahead_of_time.GRANULARITIES, strict=True):
        launch_linear(dtype, granularity)
        launch_linear(dtype, granularity, residual=zeros(1, 70, 128, dtype=dtype))
    launch_squares(DTYPES[0])


def every_attention(card):
    for dtype in DTYPES:
        launch_attention(dtype)


def every_attention_by_mma(card):
    for dtype in DTYPES:
        for head_dim in mma_attention.HEAD_DIMS:
            for pv in ("fp16", "fp8") if card >= ADA else ("fp16",):
                launch_attention(dtype, pv, head_dim)


def every_state(card):
    for dtype in DTYPES:
        heads = zeros(1, 70, 1, 128, dtype=dtype)
        key_value_state(heads, heads, backend="triton")
        for pv in ("fp8",) if card == HOPPER else ("fp16", "fp8") if card >= ADA else ("fp16",):
            keys = zeros(1, 1, 128, 128, dtype=torch.int8), zeros(1, 1, 2)
            of_channels, values = zeros(1, 1, 128), zeros(1, 1, 2, 128, 64, dtype=PV_DTYPES[pv])
            given = *keys, of_channels.to(dtype), heads, values, of_channels
            state_of_int8_keys(*given, backend="triton")


def every_convolution(card):
    # Each takes seconds to compile, and dtypes differ in a few instructions at the end.
    for dtype, columns in zip(DTYPES, (96, 192), strict=True):
        frames_conv(zeros(1, 3, 4, 4, 96, dtype=dtype), zeros(3, 3, 3, columns, 96, dtype=dtype))


def every_quantizer(card):
    for dtype, channels in zip(DTYPES, (8960, 13824), strict=True):
        for activation in (None, "gelu_tanh"):
            x = zeros(1, 3, channels, dtype=dtype)
            quantize_rows(x, activation, backend="triton")


def every_requantizer(card):
    for columns in (1536, 5120, 8960, 13824):  # of the models
        requantize_rows(zeros(3, columns, dtype=torch.int8), zeros(1, -(-columns // 128)), "triton")


def every_layer_norm(card):
    # One with an odd number of spans, whose rows have a warp each.
    for dtype, channels in zip((*DTYPES, DTYPES[0]), (1536, 5120, 256), strict=True):
        layer_norm_quant(zeros(1, 3, channels, dtype=dtype), "rows", backend="triton")


def every_text_attention(card):
    for dtype in DTYPES:
        q, k = (zeros(1, length, 1, 128, dtype=dtype) for length in (70, 9))
        text_attention(q, k, k, backend="triton")


def every_selection(card):
    for dim in HEAD_DIMS:
        select_blocks(zeros(1, 1, 1, dim), zeros(1, 1, 513, dim), 1, backend="triton")


def every_product(card):
    for name in ceilings.products_of(card):
        kernel = ceilings._kernel(name, torch.device("cuda", 0))
        kernel.launch(1, ceilings.THREADS, ceilings.Operands())


class Kernel(NamedTuple):
    """How to launch a kernel in every configuration that the host code may choose, and its limits.

    `registers` are those a thread starts with, `spills` bytes of a thread, `products` those in the
    machine code for a card, `sizes` what Python and the file have to agree on.
    """

    launch: Callable[[Card], None]
    cards: tuple[Card, ...]
    registers: int
    products: Callable[[Card], set[str]]
    spills: int = 0
    spills_of_card: Mapping[Card, int] = types.MappingProxyType({})  # where they differ
    sizes: Mapping[str, int] = types.MappingProxyType({})


def ceilings_products(card: Card) -> set[str]:
    """Those that kernels/ceilings.py names."""
    products = {"IMMA.16832.S8.S8", "HMMA.16816.F32", "HMMA.16816.F16"}
    fp8 = {"QMMA.16832.F32.E4M3.E4M3", "QMMA.16832.F16.E4M3.E4M3"}
    return products | fp8 if len(ceilings.products_of(card)) == 5 else products


def attention_products(card: Card) -> set[str]:
    """Those of mma.sync that the card is fast at: GeForce cards add up in float16."""
    values = {"HMMA.16816.F32" if card in mma_attention.LONG_SUMS else "HMMA.16816.F16"}
    fp8 = {"QMMA.16832.F16.E4M3.E4M3"} if card >= ADA else set()
    return {"IMMA.16832.S8.S8"} | values | fp8


def prepare_products(card: Card) -> set[str]:
    """Of block means, and of the linear branch, which Hopper's kernel takes in bfloat16 alone."""
    branch = {"HGMMA.64x64x16.F32.BF16", "HGMMA.64x72x16.F32.BF16"}
    return {"HMMA.16816.F32", "HMMA.16816.F32.BF16"} | (branch if card == HOPPER else set())


# Of attention on Hopper: scores, and weights with values.
BY_WGMMA = {"IGMMA.64x64x32.S8.S8", "QGMMA.64x128x32.F32.E4M3.E4M3"}
BY_MMA_SYNC = tuple(card for card in CARDS if card[0] in dispatch.BY_MMA_SYNC)
PREPARE_SPILLS = {(8, 0): 80, (8, 6): 64, (8, 9): 64, HOPPER: 40, (12, 0): 48}  # bytes
# Where a tile ends, not in the loop over k: a thread has 192 sums.
LINEAR_SPILLS = 72

# By file. Attention's and the linear layer's multiplying warps on Hopper take more registers from
# their program's pool than they start with. By mma.sync 255 registers hold two tiles of 16 x 128
# sums, a block's scores and what they become, or are made of. Two programs of prepare share a
# multiprocessor, whose spills cost less than they hide.
KERNELS = {
    "sparse_attention/hopper.cu": Kernel(
        every_attention, (HOPPER,), 168, spills=32, products=lambda card: BY_WGMMA,
        sizes=dict(zip(("HEAD_DIM", "BLOCK_Q", "BLOCK_K"), attention.SHAPE, strict=True)),
    ),
    "sparse_attention/mma.cu": Kernel(
        every_attention_by_mma, BY_MMA_SYNC, 255, spills=32, products=attention_products,
        sizes=dict(zip(("BLOCK_Q", "BLOCK_K"), mma_attention.SHAPE, strict=True)),
    ),
    "int8_linear/mma.cu": Kernel(
        every_linear_by_mma, BY_MMA_SYNC, 255, spills=LINEAR_SPILLS,
        products=lambda card: {"IMMA.16832.S8.S8"}, sizes={"BLOCK": checks.BLOCK},
    ),
    "int8_linear/hopper.cu": Kernel(
        every_linear, (HOPPER,), 168, products=lambda card: {"IGMMA.64x256x32.S8.S8"},
        sizes={"TILE_L": linear.TILE_L, "TILE_N": linear.TILE_N},
    ),
    "int8_quant/hopper.cu": Kernel(
        every_quantizer, (HOPPER,), 128, products=lambda card: set(), sizes={"SPAN": rows.SPAN}
    ),
    "int8_quant/mma.cu": Kernel(
        every_quantizer, BY_MMA_SYNC, 56, products=lambda card: set(), sizes={"SPAN": mma_rows.SPAN}
    ),
    "requantize/mma.cu": Kernel(
        every_requantizer, BY_MMA_SYNC, 96, spills=8, products=lambda card: set(),
        sizes={"CHUNK": weights.CHUNK},
    ),
    "norm_quant/cuda.cu": Kernel(
        every_layer_norm, (HOPPER, *BY_MMA_SYNC), 168, spills_of_card={HOPPER: 40, (12, 0): 88},
        products=lambda card: set(), sizes={"SPAN": layer_norm.SPAN},
    ),
    "frames_conv/hopper.cu": Kernel(
        every_convolution, (HOPPER,), 168,
        products=lambda card: {"HGMMA.64x96x16.F32.BF16", "HGMMA.64x192x16.F32"},
        sizes={"ACROSS": conv.ACROSS, "DEPTH": conv.DEPTH, "STAGES": conv.STAGES},
    ),
    "qk_prepare/cuda.cu": Kernel(
        every_prepare, (HOPPER, *BY_MMA_SYNC), 168, spills_of_card=PREPARE_SPILLS,
        products=prepare_products,
        sizes={name: getattr(cuda_prepare, name) for name in ("HEAD_DIM", "MOST_HEADS")},
    ),
    "linear_attention/hopper.cu": Kernel(
        every_state, (HOPPER,), 128,
        products=lambda card: {
            f"HGMMA.64x{n}x16.F32{kind}" for n in (8, 128) for kind in ("", ".BF16")
        },
        sizes={name: getattr(hopper_state, name) for name in ("HEAD_DIM", "TILE", "STAGES")},
    ),
    "linear_attention/mma.cu": Kernel(
        every_state, BY_MMA_SYNC, 128, spills_of_card={(12, 0): 24},
        products=lambda card: {"HMMA.16816.F32", "HMMA.16816.F32.BF16"},
        sizes={"HEAD_DIM": state.HEAD_DIM, "STAGES": state.STAGES},
    ),
    "linear_attention/int8_keys.cu": Kernel(
        every_state, BY_MMA_SYNC, 128, spills_of_card={(12, 0): 16},
        products=lambda card: {"HMMA.16816.F32", "HMMA.16816.F32.BF16"},
        sizes={name: getattr(state, name) for name in ("HEAD_DIM", "TILE", "BLOCK")},
    ),
    "linear_attention/parts.cu": Kernel(
        every_state, BY_MMA_SYNC, 48, products=lambda card: set(), sizes={"THREADS": state.THREADS}
    ),
    "text_attention/mma.cu": Kernel(
        every_text_attention, BY_MMA_SYNC, 128,
        products=lambda card: {"HMMA.16816.F32", "HMMA.16816.F32.BF16"},
        sizes={name: getattr(text, name) for name in ("HEAD_DIM", "KEYS", "ROWS", "WARPS")},
    ),
    "block_map/cuda.cu": Kernel(
        every_selection, (HOPPER, *BY_MMA_SYNC), 128, spills_of_card={(8, 0): 40},
        products=lambda card: set(), sizes={"WARPS": selection.WARPS},
    ),
    "block_map/scores.cu": Kernel(
        every_selection, BY_MMA_SYNC, 168, products=lambda card: {"HMMA.1688.F32.TF32"},
        sizes={name: getattr(scores, name) for name in ("QUERIES", "KEYS")},
    ),
    "ceilings.cu": Kernel(
        every_product, CARDS, 64, products=ceilings_products, sizes={"CHAINS": ceilings.CHAINS}
    ),
}  # fmt: skip
