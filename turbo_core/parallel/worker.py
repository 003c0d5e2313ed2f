"""A worker: does one job after the other that its parent tells it, and ends when the parent does.

    python worker.py DESCRIPTOR    started by workers.py, with its end of a connection
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
    sys.path[:] = [*told["paths"], *(p for p in sys.path if Path(p).resolve() != ROOT)]
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]
    pack = types.ModuleType(PACK)
    pack.__path__ = [str(ROOT)]
    sys.modules[PACK] = pack
    jobs = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, jobs), daemon=True).start()
    if told["first"]:
        name, arguments = told["first"]
        _function(name)(*arguments)
    exchange = importlib.import_module(f"{PACK}.turbo_core.parallel.exchange")
    parcels = importlib.import_module(f"{PACK}.turbo_core.parallel.parcels")
    connection.send((True, "ready"))
    ranks = exchange.join(**told["group"])
    while True:
        parcel, blanks = jobs.get()
        try:
            tensors = exchange.take(ranks, [exchange.Blank(*blank) for blank in blanks])
            job, arguments = parcels.unwrap(parcel, tensors)
            job = _function(job) if isinstance(job, str) else job
            del tensors
            answer = True, job(ranks, *arguments)
            del arguments
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)


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
