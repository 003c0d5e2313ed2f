"""Words as vectors: what stands in for a text encoder in the toy world.

A word is 64 signs taken from its hash, in the first of Wan's 4096 text channels; the other
channels are zero. Wan's cross-attention has no positions, so a prompt is a bag of words.
"""

import functools
import hashlib
import logging

import torch

from .world import REGIONS, WORDS

TOKENS = 16  # padded with zeros, not to umT5's 512: the padding has a say in the attention
CHANNELS = 64
TEXT_DIM = 4096
VOCABULARY = {"a", "in", "the", "on", *REGIONS} | {
    word for said in WORDS.values() for phrase in said for word in phrase.split()
}

log = logging.getLogger(__name__)


def encode(prompt: str) -> torch.Tensor:
    """A prompt as Wan's text features, float32 [16, 4096]. An empty one is all zeros."""
    return widen(signs(prompt))


def signs(prompt: str) -> torch.Tensor:
    """The channels of `encode` that are not always zero, float32 [16, 64].

    A word that the world has no use for is zero, and the log says so; so it does where a prompt
    has more than 16 words, of which the first 16 count.
    """
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    unknown = sorted(set(words) - VOCABULARY)
    if unknown:
        log.warning("The toy world knows no %s; it knows: %s", unknown, sorted(VOCABULARY))
    if len(words) > TOKENS:
        log.warning("Of a prompt's %d words the toy world hears the first %d", len(words), TOKENS)
    features = torch.zeros(TOKENS, CHANNELS)
    for i, word in enumerate(words[:TOKENS]):
        if word in VOCABULARY:
            features[i] = word_signs(word)
    return features


@functools.cache
def word_signs(word: str) -> torch.Tensor:
    """64 signs, -1 or 1, float32: the first bits of the word's SHA-256."""
    digest = hashlib.sha256(word.encode()).digest()
    bits = [byte >> i & 1 for byte in digest[: CHANNELS // 8] for i in range(8)]
    return torch.tensor(bits, dtype=torch.float32) * 2 - 1


def widen(features: torch.Tensor) -> torch.Tensor:
    """[..., 64] as Wan's [..., 4096]."""
    return torch.nn.functional.pad(features, (0, TEXT_DIM - features.shape[-1]))
