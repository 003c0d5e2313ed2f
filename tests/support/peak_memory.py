"""How much anonymous memory (memory that no file backs) a piece of work takes at its peak."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")
INTERVAL = 0.002  # seconds


class Peak:
    """Set when the measured work has ended."""

    bytes = 0


def can_measure() -> bool:
    """Whether this system tells anonymous memory (Linux does)."""
    return STATUS.exists()


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process; memory-mapped files do not count."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())[1])


@contextmanager
def peak_anonymous() -> Iterator[Peak]:
    """Sample anonymous memory while the body runs.

    Yields an object whose `bytes` is, after the body, the highest sample minus the level before.
    Use it in a fresh process: memory freed before and taken again does not show as growth.
    """
    peak, done = Peak(), threading.Event()
    start = anonymous_bytes()
    samples = [start]

    def sample():
        while not done.wait(INTERVAL):
            samples.append(anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        samples.append(anonymous_bytes())
        peak.bytes = max(samples) - start
