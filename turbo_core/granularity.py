"""What INT8 linears multiply in, as a user chooses it."""

# By the names of the nodes: the checkpoint's own 128x128 blocks of scales, or a scale per token and
# output channel, which is faster; both stay within the same bounds of the original's outputs.
GRANULARITIES = {"fast": "rows", "exact": "blocks"}


def scales_of(granularity: str) -> str:
    """What `granularity`, "fast" or "exact", has a scale for: "rows" or "blocks".

    Raises:
        ValueError: it is another one.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}"
        )
    return GRANULARITIES[granularity]
