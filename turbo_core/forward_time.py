"""How long a forward pass should take on a card where none was timed: an estimate, see `estimate`.

What it rests on: passes timed on an H100 that plays an older card (its code and instructions on
that silicon), and what is published of the others.
tests/benchmarks/estimate.py prints it, and the rows of MEASURED.
"""

from typing import NamedTuple

from ..kernels.block_map import selected_count
from ..kernels.ceilings import FP8_SHORT, FP16, FP16_SHORT, INT8
from ..kernels.tuning import of_card
from .cards import Card

BLOCK_K = 64  # keys of a block
TEXT_LENGTH = 512
TOPK = 0.1

# Shares of what a card reaches at best that nothing here was measured for.
COPY_SHARE = 0.9  # a copy, of the published bandwidth; 2990 of 3350 GB/s on an H100
TEXT_SHARE = 0.7  # cross-attention, torch's; up to 0.73 on an A100 (FlashAttention-2, section 4)

# Multiprocessors of the H100 x its highest clock in GHz: what is not multiplied goes at this rate.
H100_SM_GHZ = 132 * 1.98

ASSUMPTIONS = (
    "Slow end: every kernel reaches the share of its card's products that it reaches on the H100,"
    " and the card holds its base clock.",
    "Fast end: the boost clock, and what a kernel does beside its products goes with"
    " multiprocessors x clock.",
    f"Kernels that move data take as on the H100 by a copy's speed, {COPY_SHARE:.0%} of the"
    f" published bandwidth; torch's attention to the text reaches {TEXT_SHARE:.0%}.",
    "GeForce cards multiply fp16 and fp8 with fp32 sums at half the rate: those of torch, not those"
    " of SageSLA, whose sums there are fp16 (fp8 needs a torch of CUDA 12.8 or newer); fp8 values"
    " are taken to cost beside their products what fp16 values cost.",
    "No weights are streamed, and Python keeps ahead of the card.",
)


class Shape(NamedTuple):
    """A model and a video of it."""

    dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    width: int
    height: int
    frames: int = 81

    @property
    def latent(self) -> tuple[int, int, int]:
        return (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def tokens(self) -> int:
        t, h, w = self.latent
        return t * (h // 2) * (w // 2)


MODELS = {
    "1.3B-480P": Shape(1536, 8960, 30, 16, 832, 480),
    "14B-480P": Shape(5120, 13824, 40, 16, 832, 480),
    "14B-720P": Shape(5120, 13824, 40, 16, 1280, 720),
    "A14B-I2V-720P": Shape(5120, 13824, 40, 36, 1280, 720),
}


class Parts(NamedTuple):
    """ms of one forward pass by what its kernels do."""

    linear: float  # INT8 linears
    attention: float  # the sparse kernel of SageSLA
    text: float  # cross-attention
    rest: float  # what moves data

    def total(self) -> float:
        """ms of the whole pass."""
        return sum(self)


class Session(NamedTuple):
    """Passes of one H100 that played a card, with fp16 values."""

    tops: dict[str, float]  # products it reached at best, see kernels/ceilings.py
    copy_gbs: float
    passes: dict[str, Parts]  # by model


# By the card that was played: 99 KB of shared memory from sm_86 on, 163 KB before. fp8 is emulated
# on Hopper, so cards that have it are reckoned from the row with fp16 values. Both were given by
# `forward.py --card 8.0 --models` of all of MODELS, and `--card 8.6`, on one H100.
MEASURED: dict[tuple[int, int], Session] = {
    (8, 0): Session(
        {INT8: 1275, FP16: 648},
        2991,
        {
            "1.3B-480P": Parts(91.9, 39.4, 5.5, 35.1),
            "14B-480P": Parts(813.0, 180.2, 25.0, 124.0),
            "14B-720P": Parts(1852.8, 925.0, 57.1, 270.4),
            "A14B-I2V-720P": Parts(1858.4, 926.8, 57.3, 271.0),
        },
    ),
    (8, 6): Session(
        {INT8: 1286, FP16: 643},
        2988,
        {
            "1.3B-480P": Parts(90.2, 41.1, 5.5, 35.0),
            "14B-480P": Parts(801.0, 189.5, 24.7, 123.4),
            "14B-720P": Parts(1831.1, 977.8, 56.6, 269.5),
            "A14B-I2V-720P": Parts(1832.4, 976.1, 56.8, 269.9),
        },
    ),
}

# What our kernels multiply attention's weights and values in, see sparse_attention/mma.py.
VALUES = {(8, 0): FP16, (8, 6): FP16_SHORT, (8, 9): FP8_SHORT}


def linear_operations(shape: Shape) -> float:
    """Of the INT8 linears in one forward pass, those of the text features included."""
    length, dim, ffn = shape.tokens, shape.dim, shape.ffn_dim
    tokens = length * (6 * dim * dim + 2 * dim * ffn) + TEXT_LENGTH * 2 * dim * dim
    return 2.0 * shape.num_layers * tokens


def self_attention_operations(shape: Shape, topk: float | None) -> float:
    """Of both products over the selected key blocks; over all keys if topk is None."""
    keys = shape.tokens
    if topk is not None:
        keys = BLOCK_K * selected_count(topk, -(-keys // BLOCK_K))
    return 4.0 * shape.num_layers * shape.tokens * shape.dim * keys


def cross_attention_operations(shape: Shape) -> float:
    """Of both products with the text's tokens."""
    return 4.0 * shape.num_layers * shape.tokens * shape.dim * TEXT_LENGTH


def estimate(card: Card, model: str) -> tuple[float, float] | None:
    """ms of a forward pass of `model` (of MODELS) on a card nobody timed: the fast and slow end.

    None where that model was not measured. See ASSUMPTIONS.
    """
    session = of_card(MEASURED, card.capability)
    measured, shape = session.passes.get(model), MODELS[model]
    if measured is None:
        return None
    values = of_card(VALUES, card.capability)
    attention = self_attention_operations(shape, TOPK) / 2e9
    here = {  # ms at best on the H100, then on the card
        "linear": (
            linear_operations(shape) / 1e9 / session.tops[INT8],
            linear_operations(shape) / 1e9 / card.tops[INT8],
        ),
        "attention": (
            attention / session.tops[INT8] + attention / session.tops[FP16],
            attention / card.tops[INT8] + attention / card.tops[values],
        ),
    }
    rest = measured.rest * session.copy_gbs / (COPY_SHARE * card.gbs)
    text = cross_attention_operations(shape) / 1e9 / (TEXT_SHARE * card.tops[FP16])
    slower = H100_SM_GHZ / (card.multiprocessors * card.boost_mhz / 1000)
    fast, slow = text + rest, text / card.lasting() + rest
    for part, (best, best_there) in here.items():
        ms = getattr(measured, part)
        fast += best_there + max(ms - best, 0) * slower
        slow += best_there / card.lasting() * ms / best
    return min(fast, slow), slow


def estimate_here(
    model: str, linear_tops: float, attention_tops: float, tops: dict[str, float], copy_gbs: float
) -> float | None:
    """ms of a forward pass of `model` on a card whose speeds were measured, its passes were not.

    Args:
        linear_tops, attention_tops: what our kernels reach on it, TOPS.
        tops, copy_gbs: what it reaches at best, as kernels/ceilings.py measures it.
    """
    session, shape = of_card(MEASURED, (8, 6)), MODELS[model]
    if model not in session.passes:
        return None
    return Parts(
        linear_operations(shape) / 1e9 / linear_tops,
        self_attention_operations(shape, TOPK) / 1e9 / attention_tops,
        cross_attention_operations(shape) / 1e9 / (TEXT_SHARE * tops[FP16]),
        session.passes[model].rest * session.copy_gbs / copy_gbs,
    ).total()
