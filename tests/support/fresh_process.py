"""Calls a function in a process of its own.

Where a process can fork, each one comes from a process that waits with torch in it: to import it
takes longer than most of what is called. It is one for all callers, with what the first preloads.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

HOW = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def context(preload: str):
    """Where processes come from. Triton in it, if any, compiles: its interpreter stays outside."""
    made = multiprocessing.get_context(HOW)
    if HOW == "forkserver":
        from multiprocessing.forkserver import ensure_running

        made.set_forkserver_preload([preload])
        # Python 3.11 finds what is preloaded by PYTHONPATH.
        with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent)):
            os.environ.pop("TRITON_INTERPRET", None)
            ensure_running()
    return made


def call(function: Callable, *args):
    """What `function` returns there, or raises; a function of a module in tests/support."""
    with ProcessPoolExecutor(1, mp_context=context("torch")) as pool:
        return pool.submit(function, *args).result()
