"""A worker: does one job after the other that its parent tells it, and ends when the parent does.

Started by workers.py as `python worker.py DESCRIPTOR`, with its end of a connection.
"""

import importlib
import os
import queue
import signal
import sys
import threading
import traceback
import types
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACK = "turbodiffusion_wan"


def main() -> None:
    """Join the other ranks, then do jobs until there is nobody to give them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent
    connection = Connection(int(sys.argv[1]))
    told = connection.recv()
    jobs = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, jobs), daemon=True).start()
    try:
        exchange, parcels = _set_up(told)
    except BaseException:
        connection.send((False, traceback.format_exc()))
        raise
    connection.send((True, "ready"))
    ranks = exchange.join(**told["group"])
    while True:
        parcel, blanks = jobs.get()
        try:
            tensors = exchange.take(ranks, [exchange.Blank(*blank) for blank in blanks])
            job, arguments = parcels.unwrap(parcel, tensors)
            answer = True, job(ranks, *arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        tensors = arguments = None  # or they would be there until the next job
        connection.send(answer)


def _set_up(told: dict) -> tuple[types.ModuleType, types.ModuleType]:
    """Make the pack importable, and ComfyUI if it is told of; what main needs of the pack."""
    sys.path[:] = [*told["paths"], *(p for p in sys.path if Path(p).resolve() != ROOT)]
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]
    pack = types.ModuleType(PACK)
    pack.__path__ = [str(ROOT)]
    sys.modules[PACK] = pack
    if told["first"]:
        name, arguments = told["first"]
        _function(name)(*arguments)
    names = (f"{PACK}.turbo_core.parallel.{name}" for name in ("exchange", "parcels"))
    return tuple(importlib.import_module(name) for name in names)


def _listen(connection: Connection, jobs: queue.SimpleQueue) -> None:
    """Hand jobs on. Where the parent is gone, end at once, whatever the worker is waiting for."""
    try:
        while True:
            jobs.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _function(name: str):
    """The function "module:function"; a module that begins with a dot is the pack's."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module, PACK), function)


if __name__ == "__main__":
    main()
