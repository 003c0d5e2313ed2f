"""Worker processes that take part in what this one computes, as ranks 1 and up of a group.

This process is rank 0 and says what is to be done: a job is the name of a function and small
arguments, never a tensor; what is large goes through the group. A worker waits for a job without
using a core. Between two jobs nothing is under way, so that is where a run may be cancelled. A
worker ends as soon as its connection does: no other end of this process, however sudden, leaves one
behind. If a job fails anywhere, all workers are ended and the next job starts new ones.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from multiprocessing import Pipe, connection
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from .exchange import Ranks, join

WORKER = Path(__file__).with_name("worker.py")

T = TypeVar("T")


class WorkerError(Exception):
    """A worker failed or is gone; the message has its traceback, if it left one."""


class Workers:
    """Processes 1 to count - 1 of a group that this process is the first of.

    Args:
        count: how many processes, this one included.
        backend: "gloo", or "cpu:gloo,cuda:nccl" between GPUs.
        paths: where workers import from besides the pack.
        arguments: their sys.argv, for ComfyUI.
        seconds: after which an exchange gives up.
    """

    def __init__(
        self,
        count: int,
        backend: str = "gloo",
        paths: Sequence[str] = (),
        arguments: Sequence[str] = (),
        seconds: float = 600,
    ):
        self.count, self.backend, self.seconds = count, backend, seconds
        self.told = {"paths": list(paths), "arguments": list(arguments)}
        self.processes: list[subprocess.Popen] = []
        self.connections: list[connection.Connection] = []
        self.ranks: Ranks | None = None
        self.folder: tempfile.TemporaryDirectory | None = None  # where they meet

    def together(self, job: str, arguments: tuple, own: Callable[[Ranks], T]) -> T:
        """own(ranks) here while every worker does `job` with its ranks and `arguments`.

        Args:
            job: "module:function"; a module that begins with a dot is the pack's.

        Raises:
            WorkerError: a worker failed or is gone. This, and whatever `own` raises, ends them all.
        """
        if self.ranks is None:
            self._start()
        watch = _Watch(self.connections, self._end)
        try:
            for end in self.connections:
                end.send((job, arguments))
            result = own(self.ranks)
        except BaseException as error:
            # An exchange may notice that a worker is gone before the watch does.
            watch.failed.wait(1 if isinstance(error, (RuntimeError, OSError)) else 0)
            failure = watch.failure
            self._stop_watched(watch)
            if failure is None:
                raise
            raise WorkerError(failure) from error
        if not watch.wait(self.seconds):
            failure = watch.failure or f"a worker has not answered for {self.seconds:g} s"
            self._stop_watched(watch)
            raise WorkerError(failure)
        return result

    def stop(self) -> None:
        """End all workers; the next job starts new ones."""
        self._end()
        for end in self.connections:
            end.close()
        if self.ranks is not None:
            dist.destroy_process_group()
        if self.folder is not None:
            self.folder.cleanup()
        self.processes, self.connections, self.ranks, self.folder = [], [], None, None

    def _stop_watched(self, watch: "_Watch") -> None:
        """End all workers, and so the watch, before the connections it waits for are closed."""
        self._end()
        watch.thread.join()
        self.stop()

    def _start(self) -> None:
        # For as long as there is the group: NCCL meets there at its first exchange only.
        self.folder = tempfile.TemporaryDirectory()
        group = {"backend": self.backend, "store": str(Path(self.folder.name) / "ranks")}
        group |= {"count": self.count, "seconds": self.seconds}
        try:
            for rank in range(1, self.count):
                self._start_one({**self.told, "group": {**group, "rank": rank}})
            ready = _Watch(self.connections, self._end)
            if not ready.wait(self.seconds):
                raise WorkerError(ready.failure or "the workers do not start")
            self.ranks = join(**group, rank=0)
        except BaseException:
            self.stop()
            raise

    def _start_one(self, told: dict) -> None:
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, str(WORKER), str(theirs.fileno())]
            self.processes.append(
                subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
            )
        self.connections.append(ours)
        ours.send(told)

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


class _Watch:
    """Waits for one answer of every worker, in a thread; at the first failure calls `end`.

    Whoever is in an exchange with a worker that has failed is let go by the end of all of them.
    """

    def __init__(self, connections: list[connection.Connection], end: Callable[[], None]):
        self.failure: str | None = None
        self.failed = threading.Event()
        self.waiting, self.end = list(connections), end
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether all have answered well, within so many seconds."""
        self.thread.join(seconds)
        return not self.thread.is_alive() and self.failure is None

    def _listen(self) -> None:
        while self.waiting:
            for ready in connection.wait(self.waiting):
                try:
                    well, answer = ready.recv()
                except (EOFError, OSError):
                    well, answer = False, "a worker is gone: it was ended, or out of memory"
                if not well:
                    self.failure = answer
                    self.failed.set()
                    self.end()
                    return
                self.waiting.remove(ready)
