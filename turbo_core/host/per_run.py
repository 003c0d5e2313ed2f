"""What stays the same for a whole sampler run, and is made or fetched once in it."""

import contextlib
import contextvars
from collections.abc import Callable, Hashable, Iterator


class PerRun:
    """Of one run: the texts' keys and values, see text.py, the rotation, see rope.py, what `made`
    made, and what ends it."""

    def __init__(self):
        self.texts, self.knew_text = [], False
        self.rotation = None  # what it depends on, and itself
        self.made = {}
        self.ends = contextlib.ExitStack()


_current = contextvars.ContextVar("turbodiffusion_per_run", default=None)


@contextlib.contextmanager
def keep(wanted: bool = True) -> Iterator[None]:
    """Until the end of this context things are kept, if `wanted`.

    Not wanted where weights change within the run. Inside another run, with that one.
    """
    if not wanted or _current.get() is not None:
        yield
        return
    run = PerRun()
    token = _current.set(run)
    try:
        with run.ends:
            yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """Until the end of this context nothing that was kept is known, and nothing is kept."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def current() -> PerRun | None:
    """What is kept in this run; None outside of one."""
    return _current.get()


def made(key: Hashable, make: Callable):
    """make(), in a run once for each key."""
    run = current()
    if run is None:
        return make()
    if key not in run.made:
        run.made[key] = make()
    return run.made[key]
