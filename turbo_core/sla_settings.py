"""What a user chose for the self-attention of a model, as plain scalars."""

import dataclasses
import re

from ..kernels.dispatch import BACKENDS

ATTENTIONS = ("sagesla", "sla", "dense")


@dataclasses.dataclass(frozen=True)
class SLASettings:
    """Self-attention of every transformer block.

    Attributes:
        attention: "sagesla" (SLA with INT8 QK), "sla" (16-bit SLA) or "dense" (ComfyUI's own).
        topk: share of the key blocks that get exact attention, in (0, 1].
        dense_blocks: indices of the transformer blocks that stay dense.
        dense_steps: how many of the first sampling steps stay dense.
        backend: "auto", "triton" or "reference", see kernels/dispatch.py.
    """

    attention: str = "sagesla"
    topk: float = 0.1
    dense_blocks: tuple[int, ...] = ()
    dense_steps: int = 0
    backend: str = "auto"

    def __post_init__(self):
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {ATTENTIONS}, got {self.attention!r}")
        if not isinstance(self.topk, (int, float)) or not 0 < self.topk <= 1:
            raise ValueError(f"topk must be above 0 and at most 1, got {self.topk!r}")
        if not isinstance(self.dense_steps, int) or self.dense_steps < 0:
            raise ValueError(f"dense_steps must be a number from 0 up, got {self.dense_steps!r}")
        if self.backend not in BACKENDS:
            raise ValueError(
                f"backend {self.backend!r} is unknown, use one of {', '.join(BACKENDS)}"
            )


def parse_blocks(text: str, num_blocks: int) -> tuple[int, ...]:
    """Block indices from text such as "0, 2-4, 39"; empty text means none.

    Raises:
        ValueError: not numbers and ranges, a range that runs backwards, or a block the model does
            not have.
    """
    if not isinstance(text, str):
        raise ValueError(f"dense blocks are text such as '0, 2-4', got {text!r}")
    blocks = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        blocks.update(_parse_range(part, num_blocks))
    return tuple(sorted(blocks))


def _parse_range(part: str, num_blocks: int) -> range:
    """The blocks that one part between commas names: "7", or "2-4" with both ends."""
    numbers = re.fullmatch(r"(\d{1,18})(?:\s*-\s*(\d{1,18}))?", part, re.ASCII)
    if numbers is None:
        raise ValueError(f"dense blocks are numbers and ranges such as '0, 2-4', got {part[:40]!r}")
    first, last = int(numbers[1]), int(numbers[2] or numbers[1])
    if first > last:
        raise ValueError(
            f"dense blocks name the range {part!r}, which runs backwards. Write '{last}-{first}'"
        )
    if last >= num_blocks:
        raise ValueError(
            f"dense blocks name block {max(first, num_blocks)}, but this model has blocks "
            f"0 to {num_blocks - 1}"
        )
    return range(first, last + 1)
