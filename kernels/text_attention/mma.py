"""Attention to a short text by mma.sync, for GeForce cards and A100, in CUDA C++: see mma.cu."""

import functools
import math
import struct
from pathlib import Path
from typing import NamedTuple

import torch

from .. import nvrtc
from ..checks import in_steps_of_16_bytes
from ..dispatch import capability, multiprocessors

SOURCE = Path(__file__).with_suffix(".cu")
HEAD_DIM = 128
KEYS = 128  # that a program keeps, at most
ROWS = 16  # queries of a warp
WARPS = 16
SHARED_BYTES = 2 * KEYS * HEAD_DIM * 2 + KEYS * 4 + 6 * 4  # mma.cu's Shared
LOG2_E = math.log2(math.e)
Operands = nvrtc.operands(
    pointers="q k v weight norms out",
    integers="length heads keys all_heads programs even "
    "q_b q_l q_h k_b k_t k_h v_b v_t v_h last_bias scale",
)


def unfit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> str | None:
    """Why the kernel cannot attend to this short text; None where it can."""
    if q.shape[-1] != HEAD_DIM:
        return f"the head dim is {q.shape[-1]}, not {HEAD_DIM}"
    if not all(map(in_steps_of_16_bytes, (q, k, v, out))):
        return "rows do not begin at multiples of 16 bytes"
    if max(*q.stride(), *k.stride(), *v.stride()) >= 2**31:
        return "strides exceed int32"
    return None


class Shares(NamedTuple):
    """Of a head's tiles of WARPS x ROWS queries, the first `even` are shared by `programs`; what is
    left of all heads by `others`, which fetch the text of one head after another."""

    programs: int
    even: int
    others: int


@functools.cache
def shares_of(heads: int, length: int, at_once: int) -> Shares:
    """Those that end soonest, where `at_once` programs run at a time and a head's text takes as
    long to fetch as a tile."""
    tiles = -(-length // (WARPS * ROWS))
    found = [Shares(programs, tiles, 0) for programs in range(1, min(tiles, at_once) + 1)]
    programs, others = divmod(at_once, heads)
    if programs and others:
        found += [Shares(programs, even, others) for even in range(programs, tiles, programs)]

    def ends(share: Shares) -> int:
        rounds = -(-heads * share.programs // at_once)
        own = rounds * (-(-share.even // share.programs) + 1)
        if not share.others:
            return own
        left = -(-heads * (tiles - share.even) // share.others)
        return max(own, left + -(-heads // share.others) + 1)

    return min(found, key=ends)


def text_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    repeats: int,
    weight: torch.Tensor | None,
    row_norms: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """`text_attention` of the Triton file, of up to KEYS keys and of what is not `unfit`."""
    batch, length, heads, _ = q.shape
    if row_norms is not None:
        weight, row_norms = weight.float().contiguous(), row_norms.contiguous()
    programs, even, others = shares_of(batch * heads, length, multiprocessors(q.device))
    operands = Operands(
        *map(nvrtc.address, (q, k, v, weight, row_norms, out)), length, heads, k.shape[1],
        batch * heads, programs, even,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        _bits(math.log2(repeats)), _bits(LOG2_E * HEAD_DIM**-0.5),
    )  # fmt: skip
    target = nvrtc.target_of(capability(q.device), q.device)
    kernel = nvrtc.load(
        SOURCE, "text_attention", target, SHARED_BYTES, Operands, q.device.index,
        WARPS=WARPS, BF16=int(q.dtype == torch.bfloat16),
    )  # fmt: skip
    kernel.launch(programs * batch * heads + others, 32 * WARPS, operands)
    return out


def _bits(x: float) -> int:
    """Of x as float32."""
    return int.from_bytes(struct.pack("<f", x), "little", signed=True)
