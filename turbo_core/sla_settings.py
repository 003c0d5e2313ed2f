"""What a user chose for the self-attention of a model, as plain scalars."""

import dataclasses

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
        if not 0 < self.topk <= 1:
            raise ValueError(f"topk must be above 0 and at most 1, got {self.topk}")


def parse_blocks(text: str, num_blocks: int) -> tuple[int, ...]:
    """Block indices from text such as "0, 2-4, 39"; empty text means none.

    Raises:
        ValueError: not numbers and ranges, or a block the model does not have.
    """
    blocks = set()
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise ValueError(f"dense blocks are numbers and ranges such as '0, 2-4', got {part!r}")
        named = range(int(first), int(last if dash else first) + 1)
        if named and named[-1] >= num_blocks:
            raise ValueError(
                f"dense blocks name block {max(named[0], num_blocks)}, but this model has blocks "
                f"0 to {num_blocks - 1}"
            )
        blocks.update(named)
    return tuple(sorted(blocks))
