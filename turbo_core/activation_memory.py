"""How much memory the fused block works in: what is alive beside the weights, phase by phase, and
what torch's allocator loses in between.

Counted in activations of one bf16 [B, L, C]; an int8 one is half of it. The fused block
(host/block.py) is written so that nothing outlives its use; here is what then is alive at once:

    k and v      its input 1, that in int8 1/2, k 1, v 1, and v in low bits 1/2 (fp16 values 1);
                 where v comes in halves, see `values_in_halves`, half of it; in CUDA C++ k's
                 int8 1/2 in place of k, and v as a whole
    q            input 1, k and v in low bits 1 (fp16 values 3/2), q 1 (the result takes its memory)
                 and its int8 1/2, some heads' scores and the block map
    16 bits      input 1, q, k, v 3, the linear branch 1, and the scores
    dense        input 1, q, k, v 3, then the result 1
    text         input 1 (the caller holds it), the new residual 1, its norm in int8 1/2, and of a
                 part of the tokens q twice, or q and the result
    feed-forward input 1, residual 1, its norm in int8 1/2, and of a part of the tokens what is
                 hidden, 16 bits and int8

The allocator gives back to the GPU only what it got in one piece and is free as a whole, and takes
from the smallest free piece that is large enough. What would stay in the way there is made first:
the text's keys and values before all blocks, q, k and v before the int8 that they are made of. And
what is of one size is so to the byte, see kernels/room.py: a piece that is a row too small helps
nobody. What it loses still hangs on sizes, on the convolution before the blocks and on what others
keep in between. tests/host/test_activation_memory.py plays it through.
"""

import dataclasses
import functools
from collections.abc import Iterable

from ..kernels.checks import BLOCK
from ..kernels.int8_linear import Tiles, rounds

# What is made of some tokens at a time may take so much: those fill the GPU still. In attention to
# the text it may be an activation, which self-attention takes anyway, as small launches wait for
# one another. Where parts of another length keep the GPU busy they are so much longer than even
# ones, and the last one is shorter.
PART_BYTES, TEXT_ACTIVATIONS = 350 * 2**20, 1
UNEVEN = 1.11
HIDDEN_BYTES = 3  # of a number hidden in the feed-forward layers: bf16, then beside it int8
TEXT_BYTES = 4  # of a channel in attention to the text: q twice, or q and the result
# Values of as many bytes, 16 bits, come in halves: each fills the GPU still.
HALVED_BYTES = 2**28
SCORE_BYTES = 2**25  # at once, see kernels/block_map
# Sums over keys in parts, tables, block means of small models: what does not grow with the video.
CONSTANT = 64 * 2**20
# Around the blocks, bytes a token: latents of the sampler and the model's, float32 and bf16.
AROUND = 2048
ROTATION = 12  # bytes a token and head channel: the host's matrices and our cosines and sines
SLACK = 1.02  # what is small
# Activations that the allocator cannot use: fewer where v comes in halves, but most of a part.
LOST, LOST_IN_HALVES = 1.25, 0.4
# Bytes: of the GPU the allocator takes whole PIECEs for what is larger than ALONE.
PIECE, ALONE = 2 * 2**20, 10 * 2**20


@dataclasses.dataclass(frozen=True)
class Network:
    """The sizes of a Wan model that its activations depend on."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int


def text_bytes(batch: int, length: int, dim: int) -> int:
    """What attention to the text makes of some tokens of [B, L, C] at a time may take so much."""
    return max(PART_BYTES, TEXT_ACTIVATIONS * 2 * batch * length * dim)


def part_lengths(batch: int, length: int, each: int, room: int | None = None) -> range:
    """What tokens of a sample may go through layers at once, whole blocks of scales: the first is
    that of even parts, as few as take at most `room` bytes, PART_BYTES if None, with `each` bytes a
    token, and the last is longer by UNEVEN at most."""
    most = max((PART_BYTES if room is None else room) // (batch * each * BLOCK), 1)
    blocks = -(-length // BLOCK)
    even = -(-blocks // -(-blocks // most))
    return range(even * BLOCK, min(int(even * UNEVEN), most, blocks) * BLOCK + 1, BLOCK)


@functools.cache
def soonest(
    lengths: range, batch: int, length: int, shapes: tuple[tuple[int, int], ...], tiles: Tiles
) -> int:
    """That of `lengths` whose parts are done soonest, the last one being what is left.

    They go through linears of N columns and depth K for each (N, K) in `shapes`. Divided into
    `tiles` a part keeps all multiprocessors busy but in its last round.
    """

    def ends(tokens: int) -> int:
        full, rest = divmod(length, tokens)
        return sum(
            k * (full * rounds(tiles, batch, tokens, n) + rounds(tiles, batch, rest, n))
            for n, k in shapes
        )

    return min(lengths, key=ends)


def values_in_halves(batch: int, length: int, dim: int) -> bool:
    """Whether half of the heads' values are made and quantized before the others: where that is
    much memory, and each half whole blocks of scales."""
    return batch == 1 and dim % (2 * BLOCK) == 0 and 2 * length * dim >= HALVED_BYTES


def fused_bytes(
    network: Network,
    batch: int,
    tokens: int,
    attention: str,
    fp8_values: bool = True,
    texts: int = 1,
    text_tokens: int = 512,
    topk: float = 1.0,
) -> int:
    """Upper bound of the memory of one forward pass beside the weights, in bytes.

    Args:
        network: the model.
        batch: samples in one pass, those without the prompt included.
        tokens: of each sample; four latent pixels make one.
        attention: "sagesla", "sla" or "dense", the one of them that takes most.
        fp8_values: whether SageSLA has its values in fp8 rather than float16.
        texts, text_tokens: prompts whose keys and values are kept for all blocks, and the tokens
            of each.
        topk: share of the key blocks that are attended to.
    """
    one = 2 * batch * tokens * network.dim
    scores = _score_bytes(network, batch, tokens, topk)
    halves = fp8_values and attention == "sagesla" and values_in_halves(batch, tokens, network.dim)
    k_and_v, q_phase = 3.5 if halves else 4, 3.5 if fp8_values else 4
    low_bits = max(k_and_v * one, q_phase * one + scores) + _means_bytes(network, batch, tokens)
    attending = {"sagesla": low_bits, "sla": 5 * one + scores, "dense": 5 * one}[attention]
    attending += max(LOST_IN_HALVES * one, 0.9 * PART_BYTES) if halves else LOST * one
    part = min(part_lengths(batch, tokens, HIDDEN_BYTES * network.ffn_dim)[-1], tokens)
    hidden = batch * part * HIDDEN_BYTES * network.ffn_dim
    weights = 2 * network.dim * network.ffn_dim  # up and down, requantized or kept
    fits = 2 * batch * part * network.ffn_dim <= one  # into what attention had
    feeding = (2.5 * one if fits else attending) + hidden + weights
    head_dim = network.dim // network.num_heads
    around = tokens * (AROUND * batch + ROTATION * head_dim)
    text = 4 * texts * text_tokens * network.dim * network.num_layers  # k and v, 16 bits each
    return int(SLACK * (max(attending, feeding) + around + text) + CONSTANT)


def rounding(sizes: Iterable[int]) -> int:
    """Bytes that weights of `sizes` bytes take beyond those."""
    return sum(-size % PIECE for size in sizes if size >= ALONE)


def _score_bytes(network: Network, batch: int, tokens: int, topk: float) -> int:
    """Float32 scores of query blocks of 128 and key blocks of 64, of some heads, and the map."""
    keys = -(-tokens // 64)
    each = 4 * -(-tokens // 128) * batch * network.num_heads
    return min(each * keys, max(SCORE_BYTES, each * keys // network.num_heads)) + each * max(
        int(topk * keys), 1
    )


def _means_bytes(network: Network, batch: int, tokens: int) -> int:
    """Float32 means of key blocks of 64, as they are and centered, and those of query blocks."""
    return 3 * 4 * batch * network.dim * -(-tokens // 64)
