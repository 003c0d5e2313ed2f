"""Processes on Linux, as /proc tells of them."""

import time
from pathlib import Path


def running(pid: int) -> bool:
    """Whether a process is there, other than one that nobody has waited for yet."""
    try:
        return _stat(pid)[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(pid: int) -> list[int]:
    """The processes that `pid` has started and that run."""
    found = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [child for child in found if running(child) and _parent(child) == pid]


def ended(pids: list[int], seconds: float = 20) -> bool:
    """Whether all of them end within so many seconds."""
    deadline = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(running, pids))


def listening(pid: int) -> set[tuple[str, str]]:
    """Where a process listens on the network by IPv4: addresses and ports in hexadecimal digits."""
    links = (_link(entry) for entry in Path(f"/proc/{pid}/fd").iterdir())
    sockets = {link[8:-1] for link in links if link.startswith("socket:[")}
    rows = (row.split() for row in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:])
    return {tuple(row[1].split(":")) for row in rows if row[3] == "0A" and row[9] in sockets}


def _link(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except OSError:  # it is closed by now
        return ""


def _stat(pid: int) -> list[str]:
    """The fields behind a process's name: its state, its parent and others."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _parent(pid: int) -> int:
    try:
        return int(_stat(pid)[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
