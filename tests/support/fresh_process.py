"""Calls a function in a process of its own, which has imported torch at most.

Where a process can fork, each one comes from a process that waits with torch in it: to import it
takes longer than most of what is called.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

HOW = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def call(function: Callable, *args):
    """What `function` returns there, or raises; a function of a module in tests/support."""
    context = multiprocessing.get_context(HOW)
    context.set_forkserver_preload(["torch"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()
