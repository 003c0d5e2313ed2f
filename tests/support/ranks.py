"""Processes that work together over gloo, started as torchrun starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def start(count: int, *words: str | Path) -> list[subprocess.Popen]:
    """`count` Python processes of the command line `words`, with torchrun's variables."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish(runs: list[subprocess.Popen], seconds: float = 300) -> str:
    """What the first process printed, once all have ended well; none is left whatever happens.

    Raises:
        AssertionError: a process failed, with its last words.
        subprocess.TimeoutExpired: they took longer.
    """
    try:
        told = [run.communicate(timeout=seconds) for run in runs]
    finally:
        for run in runs:
            run.kill()
    for run, (_, errors) in zip(runs, told, strict=True):
        assert run.returncode == 0, errors[-3000:]
    return told[0][0]
