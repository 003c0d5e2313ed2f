"""How the kernels are launched where that depends on the card or the width: one table for each.

What is the same on every card may stand in the kernel's own file. A card that a table does not name
takes the row of the newest card before it. "blocks" and "pointers" of INT8_LINEAR stay 128 x 128:
there a program's tile is a block of scales.

The rows of sm_90 were measured on an H100 with tests/benchmarks/tune.py, which prints such rows.
Those of other cards were chosen by ahead-of-time compilation, no such card being at hand: they fit
its shared memory and spill nothing (tests/kernels/test_ahead_of_time.py).
"""

import functools
from typing import NamedTuple, TypeVar

from .checks import BLOCK

Row = TypeVar("Row")
Card = tuple[int, int]


class Tile(NamedTuple):
    """Of a product: rows and columns of a program, and `group` row tiles that share columns."""

    m: int
    n: int
    warps: int
    stages: int
    group: int = 8

    def launch(self) -> dict[str, int]:
        """For an INT8 linear kernel: the depth of a step is that of a block of scales."""
        sizes = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": BLOCK, "GROUP": self.group}
        return {**sizes, "num_warps": self.warps, "num_stages": self.stages}


class WarpTile(NamedTuple):
    """Of int8_linear/mma.cu: a warp has `warp_l` rows and `warp_n` columns of a program's tile.

    `stages` steps of `step` bytes of k are in shared memory, of w alone where no two warps share
    rows of x: there a step of x is. `programs` share a multiprocessor.
    """

    warps_l: int
    warps_n: int
    warp_l: int
    warp_n: int
    step: int
    stages: int
    programs: int = 1

    @property
    def rows(self) -> int:
        return self.warp_l * self.warps_l

    @property
    def columns(self) -> int:
        return self.warp_n * self.warps_n

    @property
    def threads(self) -> int:
        return 32 * self.warps_l * self.warps_n


class KeyLoop(NamedTuple):
    """Of an attention kernel, whose loop has `stages` key blocks of 64 rows on their way.

    Of 128 rows two. As many `warps` as have 1024 scores each, if None.
    """

    stages: int
    warps: int | None = None

    def launch(self, block_q: int, block_k: int) -> dict[str, int]:
        stages = 2 if block_k == 128 else self.stages
        return {"num_warps": self.warps or block_q * block_k // 1024, "num_stages": stages}


class GradientLoop(NamedTuple):
    """Of a gradient kernel: a program keeps `rows` and its loop goes on by `step` rows at a time.

    Both at most a block; a program of fewer rows has as many warps less.
    """

    rows: int
    step: int
    warps: int
    stages: int

    def launch(self, block: int, other: int) -> dict[str, int]:
        """For blocks of `block` rows that meet blocks of `other` rows."""
        rows = min(self.rows, block)
        sizes = {"ROWS": rows, "STEP": min(self.step, other)}
        return {**sizes, "num_warps": self.warps * rows // self.rows, "num_stages": self.stages}


class WholeRow(NamedTuple):
    """Of a kernel that holds a row in its registers: as many warps as give a thread `values`."""

    values: int
    fewest_warps: int
    most_warps: int

    def warps(self, width: int) -> int:
        return min(max(width // (32 * self.values), self.fewest_warps), self.most_warps)


class RowLoop(NamedTuple):
    """Of a kernel whose programs, `programs` on every multiprocessor, go through all rows.

    Each reads `stages` - 1 rows ahead into shared memory.
    """

    warps: int
    stages: int
    programs: int

    @functools.cache  # noqa: B019
    def launch(self) -> dict[str, int]:
        """With the registers that let all programs run at once: a multiprocessor has 65536, a
        thread gets a multiple of 8."""
        registers = min(65536 // (32 * self.warps * self.programs) // 8 * 8, 255)
        options = {"num_warps": self.warps, "num_stages": 1, "maxnreg": registers}
        return {"STAGES": self.stages, **options}


# INT8 linear. "rows" and "blocks" are the two granularities through TMA, "wide" is "rows" with K
# over 2048 and N at least 3072 where that has a tile of its own; "pointers" is either without TMA.
# 32 KB a stage: 227 KB a block on data center Hopper and Blackwell, 163 KB on sm_80, 99 KB
# elsewhere.
INT8_LINEAR: dict[Card, dict[str, Tile]] = {
    (8, 0): {"pointers": Tile(128, 128, warps=8, stages=3)},
    (9, 0): {
        # Both for rows, where the CUDA kernel does not run. This has its SM to itself: pays where
        # K hides its epilogue, and N is wide.
        "wide": Tile(128, 256, warps=8, stages=4),
        # Two share an SM.
        "rows": Tile(128, 128, warps=4, stages=3),
        # Spills 48 bytes, yet is slower with 8 warps.
        "blocks": Tile(128, 128, warps=4, stages=3),
        "pointers": Tile(128, 128, warps=8, stages=4),
    },
    (10, 0): {
        "rows": Tile(128, 128, warps=8, stages=4),
        "blocks": Tile(128, 128, warps=8, stages=4),
        "pointers": Tile(128, 128, warps=8, stages=4),
    },
    (12, 0): {
        "rows": Tile(128, 128, warps=8, stages=3),
        "blocks": Tile(128, 128, warps=8, stages=3),
        "pointers": Tile(128, 128, warps=8, stages=3),
    },
}

# The same by mma.sync, on all cards but those of data centers since Hopper. A multiprocessor reads
# 128 bytes of shared memory a cycle: the larger a warp's part, the fewer it needs for a product. By
# blocks warps that share no rows of x wait less for one another, which is worth a fourth more.
# sm_80 has 163 KB of shared memory a block, the others 99 KB. The fastest of those that were tried
# on an H100 that plays these cards, see tests/benchmarks/NOTES.md.
MMA_LINEAR: dict[Card, dict[str, WarpTile]] = {
    (8, 0): {
        "rows": WarpTile(2, 4, 96, 64, step=64, stages=5),
        "blocks": WarpTile(8, 1, 32, 128, step=BLOCK, stages=4),
    },
    (8, 6): {
        "rows": WarpTile(2, 4, 96, 64, step=64, stages=3),
        "blocks": WarpTile(8, 1, 32, 128, step=BLOCK, stages=4),
    },
}

# The heads of a program of qk_prepare/cuda.cu, at most. On Hopper their cosines wait in shared
# memory; measured on an H100 that plays the others.
PREPARE_HEADS: dict[Card, int] = {(8, 0): 4, (9, 0): 8, (12, 0): 4}

# Attention in 16 bits, and in low bits by what its values are in. sm_80, sm_90 and sm_100 have 163
# KB of shared memory a block or more, the others 99 KB.
ATTENTION: dict[Card, dict[str, KeyLoop]] = {
    (8, 0): {"16 bit": KeyLoop(3), "fp16": KeyLoop(4), "fp8": KeyLoop(4)},  # fp8: interpreted
    (8, 6): {"16 bit": KeyLoop(2), "fp16": KeyLoop(3), "fp8": KeyLoop(3)},
    # Warp groups multiply 64 rows at a time: 4 warps keep both halves of a tile, and take half as
    # many turns. But fp8's second sum does not fit them.
    (9, 0): {"16 bit": KeyLoop(3), "fp16": KeyLoop(3, warps=4), "fp8": KeyLoop(3)},
    (10, 0): {"16 bit": KeyLoop(3), "fp16": KeyLoop(4), "fp8": KeyLoop(4)},
    (12, 0): {"16 bit": KeyLoop(2), "fp16": KeyLoop(3), "fp8": KeyLoop(3)},
}

# Attention to a text: keys of one step, and warps of a program that keeps a short text's keys. On
# Hopper measured, on other cards what spills nothing.
TEXT_KEYS: dict[Card, int] = {(8, 0): 32, (9, 0): 64, (12, 0): 32}
SHORT_TEXT_WARPS: dict[Card, int] = {(8, 0): 8, (9, 0): 4, (10, 0): 8}

# Of block selection. More warps wait for each other, fewer take longer; on Hopper so many registers
# let 12 programs share a multiprocessor, on other cards they would spill.
SELECT_BLOCKS: dict[Card, dict[str, int]] = {
    (8, 0): {"num_warps": 2, "num_stages": 1},
    (9, 0): {"num_warps": 2, "num_stages": 1, "maxnreg": 80},
    (10, 0): {"num_warps": 2, "num_stages": 1},
}

# The gradients of 16-bit attention for q ("query") and for k and v ("keys"), and its tangent. On
# Hopper 64 keys of a warp group leave room for two programs on a multiprocessor.
GRADIENTS: dict[Card, dict[str, GradientLoop]] = {
    (8, 0): {
        "query": GradientLoop(128, 64, warps=8, stages=2),
        "keys": GradientLoop(64, 64, warps=8, stages=2),
        "tangent": GradientLoop(64, 64, warps=8, stages=2),
    },
    (8, 6): {
        "query": GradientLoop(64, 64, warps=4, stages=2),
        "keys": GradientLoop(64, 64, warps=8, stages=2),
        "tangent": GradientLoop(64, 32, warps=4, stages=2),
    },
    (9, 0): {
        "query": GradientLoop(128, 64, warps=8, stages=3),
        "keys": GradientLoop(64, 64, warps=4, stages=3),
        "tangent": GradientLoop(128, 64, warps=8, stages=2),
    },
    (10, 0): {
        "query": GradientLoop(64, 64, warps=4, stages=2),
        "keys": GradientLoop(64, 64, warps=4, stages=2),
        "tangent": GradientLoop(64, 64, warps=4, stages=2),
    },
    (12, 0): {
        "query": GradientLoop(64, 32, warps=4, stages=2),
        "keys": GradientLoop(64, 32, warps=4, stages=2),
        "tangent": GradientLoop(64, 32, warps=8, stages=2),
    },
}

# What only moves data is the same on every card.
ROWS = WholeRow(values=32, fewest_warps=4, most_warps=32)  # RMSNorm, INT8 per row
# By the widest row they are for; the last also for what is wider still.
LAYER_NORM_ROWS = {
    1536: RowLoop(warps=1, stages=3, programs=12),
    5120: RowLoop(warps=4, stages=3, programs=3),
    16384: RowLoop(warps=16, stages=2, programs=1),
}
GELU_ROWS = {
    8960: RowLoop(warps=8, stages=2, programs=4),
    13824: RowLoop(warps=4, stages=2, programs=3),
}
REQUANTIZE_ROWS = WholeRow(values=64, fewest_warps=2, most_warps=4)
QUANTIZE_BLOCKS = {"num_warps": 8, "num_stages": 1}
LAYER_NORM_BLOCKS = {"num_warps": 16, "num_stages": 1}  # with 8 some cards spill
ROPE = {"ROWS": 32, "num_warps": 4, "num_stages": 1}  # a row is one head of one token


@functools.cache
def attention_launch(capability: Card, values: str, block_q: int, block_k: int) -> dict[str, int]:
    """Launch of an attention kernel on values in "16 bit", "fp16" or "fp8", see ATTENTION."""
    return of_card(ATTENTION, capability)[values].launch(block_q, block_k)


@functools.cache
def linear_tile(capability: Card, by_blocks: bool) -> WarpTile:
    """Of the INT8 linear by mma.sync with a scale for each row, or for each block."""
    return of_card(MMA_LINEAR, capability)["blocks" if by_blocks else "rows"]


@functools.cache
def gradient_launch(capability: Card, kernel: str, block: int, other: int) -> dict[str, int]:
    """Launch of the gradient kernel "query", "keys" or "tangent" on blocks of `block` rows that
    meet blocks of `other` rows, see GRADIENTS."""
    return of_card(GRADIENTS, capability)[kernel].launch(block, other)


def of_card(table: dict[Card, Row], capability: Card) -> Row:
    """The row of the newest card that is not newer than `capability`, of the oldest if none is."""
    return table[max((card for card in table if card <= capability), default=min(table))]


def of_width(table: dict[int, Row], width: int) -> Row:
    """The row for the narrowest rows that are at least `width`, for the widest if none is."""
    return table[min((w for w in table if w >= width), default=max(table))]
