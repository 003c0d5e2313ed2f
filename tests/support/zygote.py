"""Workers for tests, forked from a process that has imported what they need already.

    python zygote.py DESCRIPTOR MODULE    imports it, and forks for each script that it is told

A script gets a descriptor, its end of a connection, as its only argument.

To import them takes longer than most of what workers do in tests.
"""

import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from multiprocessing import Pipe, connection, reduction
from pathlib import Path
from unittest import mock

import processes


class Forked:
    """What stands for the Popen of a worker."""

    def __init__(self, pid: int):
        self.pid = pid

    def poll(self) -> int | None:
        return None if processes.running(self.pid) else -9

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        while self.poll() is None:
            time.sleep(0.002)


@contextlib.contextmanager
def forking(workers_module, preload: str) -> Iterator[Callable[[str, int], Forked]]:
    """While this lasts the workers of the pack's `workers_module` are forked.

    Gives what starts any script with a descriptor likewise.
    """
    ours, theirs = Pipe()
    with theirs:
        words = [sys.executable, str(Path(__file__)), str(theirs.fileno()), preload]
        # Workers have no dynamic VRAM, whatever this process has; and there are several.
        others = {k: v for k, v in os.environ.items() if k != "DYNAMIC_VRAM"}
        others["OMP_NUM_THREADS"] = "1"
        zygote = subprocess.Popen(words, pass_fds=[theirs.fileno()], env=others)

    def start(script, descriptor):
        ours.send(script)
        reduction.send_handle(ours, descriptor, zygote.pid)
        return Forked(ours.recv())

    def popen(command, pass_fds, **_):
        return start(command[1], pass_fds[0])

    instead = types.SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL)
    with mock.patch.object(workers_module, "subprocess", instead):
        yield start
    ours.close()
    zygote.kill()
    zygote.wait()


def main() -> None:
    """Import all that workers do, and fork until there is nobody to ask for it."""
    parent = connection.Connection(int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    importlib.import_module(sys.argv[2])
    with contextlib.suppress(EOFError):
        while True:
            script, handle = parent.recv(), reduction.recv_handle(parent)
            pid = os.fork()
            if pid == 0:
                parent.close()
                sys.argv = [script, str(handle)]
                runpy.run_path(script, run_name="__main__")
            os.close(handle)
            parent.send(pid)


if __name__ == "__main__":
    main()
