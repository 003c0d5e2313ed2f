"""A process that is in an exchange with a worker of its own, for tests to kill; see zygote.py.

python parent.py DESCRIPTOR    tells there the worker's process id
"""

import contextlib
import importlib
import os
import runpy
import sys
import types
from multiprocessing.connection import Connection
from pathlib import Path

import torch.distributed as dist
import worker_jobs
import zygote

module = importlib.import_module("turbodiffusion_wan.turbo_core.parallel.workers")
told = Connection(int(sys.argv[1]))


def fork(command, pass_fds, **_):
    """As Popen, which leaves a process no other descriptors: they would keep connections open."""
    pid = os.fork()
    if pid == 0:
        for name in os.listdir("/proc/self/fd"):
            if int(name) > 2 and int(name) not in pass_fds:
                with contextlib.suppress(OSError):  # that of the listing itself
                    os.close(int(name))
        sys.argv = command[1:]
        runpy.run_path(command[1], run_name="__main__")
    return zygote.Forked(pid)


module.subprocess = types.SimpleNamespace(Popen=fork, DEVNULL=None)
workers = module.Workers(2, paths=[str(Path(__file__).parent)], seconds=60)


def meet(ranks):
    told.send(workers.processes[0].pid)
    dist.barrier(ranks.group)


importlib.import_module("turbodiffusion_wan.turbo_core.parallel.parcels").KNOWN |= {"worker_jobs"}
workers.together(worker_jobs.wait, (), meet)
