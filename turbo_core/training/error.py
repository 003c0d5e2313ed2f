"""The one error of a training run that is the user's to read."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class TrainingError(RuntimeError):
    """Training cannot start or go on: the message says what is wrong, what was found, what to do.

    Attributes:
        everywhere: whether all processes of the run raised it alike, so that one may speak for all.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell an OSError of the body as one of writing `path`."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written ({error.strerror or error}), the checkpoints are whole: "
            "free some space or see who may write there, and start the same command again"
        ) from error
