"""What of this process is in memory, mapping by mapping; Linux tells."""

import collections
import ctypes
import math
import re
from pathlib import Path

SMAPS = Path("/proc/self/smaps")
MB = 1 << 20
HEAP = 64 * MB  # where the C library's heaps of threads begin, each at a multiple of it
MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ *(.*)")
IN_MEMORY = re.compile(r"(Rss|Anonymous): +(\d+) kB")


def trim() -> None:
    """Let the C library give the system back what is free in its heaps, if it is one that can."""
    library = ctypes.CDLL(None) if SMAPS.exists() else None
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def mappings() -> dict[str, int]:
    """Bytes in memory, by the mapping's name; a file's only where they were written to."""
    return by_name(SMAPS.read_text()) if SMAPS.exists() else {}


def by_name(smaps: str) -> dict[str, int]:
    sizes, name = collections.Counter(), ""
    for line in smaps.splitlines():
        if mapping := MAPPING.fullmatch(line):
            name = mapping[3] or _unnamed(int(mapping[1], 16), int(mapping[2], 16))
        elif (told := IN_MEMORY.fullmatch(line)) and (told[1] == "Anonymous") == _is_file(name):
            sizes[name] += 1024 * int(told[2])
    return dict(sizes)


def _is_file(name: str) -> bool:
    return name.startswith("/") and not name.startswith(("/dev/", "/memfd:", "/SYSV"))


def _unnamed(start: int, end: int) -> str:
    if start % HEAP == 0:
        return "[heaps of threads]"
    return f"unnamed, up to {2 ** max(math.ceil(math.log2((end - start) / MB)), 0)} MB"
