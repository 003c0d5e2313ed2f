"""How much memory the fused block works in: what is alive beside the weights, phase by phase, and
what torch's allocator loses in between.

Counted in activations of one bf16 [B, L, C]; an int8 one is half of it. The fused block
(host/block.py) is written so that nothing outlives its use; here is what then is alive at once:

    k and v      its input 1, that in int8 1/2, k 1, v 1, and the int8 of k 1/2
    q            input 1, k and v in low bits 1 (fp16 values 3/2), q 1 (the result takes its memory)
                 and its int8 1/2, and the scores of the block map
    16 bits      input 1, q, k, v 3, the linear branch 1, and the scores
    dense        input 1, that in int8 1/2, q, k, v 3, one more while k is normed
    text         input 1 (the caller holds it), the new residual 1, q 1, then the result 1
    feed-forward input 1, residual 1, and of a part of the tokens what is hidden, 16 bits and int8

The allocator gives back to the GPU only what it got in one piece and is free as a whole, and takes
from the smallest free piece that is large enough. What would stay in the way there is made first:
the text's keys and values before all blocks, q, k and v before the int8 that they are made of. What
it loses still hangs on sizes, on the convolution before the blocks and on what others keep in
between: up to nine tenths of an activation on an H200, of 14B at 720p.
tests/host/test_activation_memory.py plays it through.
"""

import dataclasses
from collections.abc import Iterable

from ..kernels.checks import BLOCK

# What the hidden activations of the feed-forward layers, 16 bits and int8, may take: so many tokens
# at once fill the GPU still.
HIDDEN_BYTES = 2**30
HIDDEN_ITEM = 3  # bytes of one hidden number: bf16, then beside it int8
# Sums over keys in parts, tables, block means of small models: what does not grow with the video.
CONSTANT = 64 * 2**20
# Around the blocks, bytes a token: latents of the sampler and the model's, float32 and bf16.
AROUND = 2048
ROTATION = 12  # bytes a token and head channel: the host's matrices and our cosines and sines
SLACK = 1.05  # what is small
LOST = 1  # activations that the allocator cannot use
# Bytes: of the GPU the allocator takes whole PIECEs for what is larger than ALONE.
PIECE, ALONE = 2 * 2**20, 10 * 2**20


@dataclasses.dataclass(frozen=True)
class Network:
    """The sizes of a Wan model that its activations depend on."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int


def part_length(batch: int, length: int, ffn_dim: int) -> int:
    """Tokens that go through the feed-forward layers at once: even parts, in whole blocks of
    scales, with at most HIDDEN_BYTES of hidden activations."""
    parts = -(-batch * length * ffn_dim * HIDDEN_ITEM // HIDDEN_BYTES)
    return -(-length // (max(parts, 1) * BLOCK)) * BLOCK


def fused_bytes(
    network: Network,
    batch: int,
    tokens: int,
    attention: str,
    fp8_values: bool = True,
    texts: int = 1,
    text_tokens: int = 512,
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
    """
    one = 2 * batch * tokens * network.dim
    scores = _score_bytes(network, batch, tokens)
    q_phase = (3.5 if fp8_values else 4) * one + scores
    attending = {
        "sagesla": max(4 * one + _means_bytes(network, batch, tokens), q_phase),
        "sla": 5 * one + scores,
        "dense": 5.5 * one,
    }[attention]
    attending += LOST * one
    part = min(part_length(batch, tokens, network.ffn_dim), tokens)
    hidden = batch * part * HIDDEN_ITEM * network.ffn_dim
    weights = 2 * network.dim * network.ffn_dim  # up and down, requantized or kept
    fits = 2 * batch * part * network.ffn_dim <= one  # into what attention had
    feeding = (2 * one if fits else attending) + hidden + weights
    head_dim = network.dim // network.num_heads
    around = tokens * (AROUND * batch + ROTATION * head_dim)
    text = 4 * texts * text_tokens * network.dim * network.num_layers  # k and v, 16 bits each
    return int(SLACK * (max(attending, feeding) + around + text) + CONSTANT)


def rounding(sizes: Iterable[int]) -> int:
    """Bytes that weights of `sizes` bytes take beyond those."""
    return sum(-size % PIECE for size in sizes if size >= ALONE)


def _score_bytes(network: Network, batch: int, tokens: int) -> int:
    """Float32 scores of query blocks of 128 and key blocks of 64, and the block map of all."""
    return 2 * 4 * batch * network.num_heads * -(-tokens // 128) * -(-tokens // 64)


def _means_bytes(network: Network, batch: int, tokens: int) -> int:
    """Float32 means of key blocks of 64, as they are and centered, and those of query blocks."""
    return 3 * 4 * batch * network.dim * -(-tokens // 64)
