"""Calls a function in a process of its own.

Where a process can fork, each one comes from a process that waits with torch in it: to import it
takes longer than most of what is called. It is one for all callers, so it has what any of them
would import in each process anew.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

HOW = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PRELOADED = ["torch", "torch._dynamo"]  # the first optimizer imports the latter


def context():
    """Where processes come from. Triton in it, if any, compiles: its interpreter stays outside."""
    made = multiprocessing.get_context(HOW)
    if HOW == "forkserver":
        from multiprocessing.forkserver import ensure_running

        made.set_forkserver_preload(PRELOADED)
        with mock.patch.dict(os.environ):
            os.environ.pop("TRITON_INTERPRET", None)
            ensure_running()
    return made


def call(function: Callable, *args):
    """What `function` returns there, or raises; a function of a module in tests/support."""
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        return pool.submit(function, *args).result()


def start(words: list[str], environment: dict[str, str], told: Path) -> multiprocessing.Process:
    """A process that is `python WORDS` with this besides in its environment, where torch has been
    imported; what it writes to stderr goes to the file `told`."""
    process = context().Process(target=_run, args=(words, environment, told))
    process.start()
    return process


def _run(words: list[str], environment: dict[str, str], told: Path) -> None:
    os.environ |= environment
    sys.argv = words
    with told.open("w") as file:
        os.dup2(file.fileno(), 2)
    runpy.run_path(words[0], run_name="__main__")
