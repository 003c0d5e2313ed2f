"""The one error of the reader, and how untrusted text is shown in it."""

import contextlib
from collections.abc import Iterator
from os import PathLike
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be used: the message says what is wrong, what was found, what to do."""


def damaged(reason: object) -> CheckpointError:
    """The error for bytes that the file's format does not allow."""
    return CheckpointError(f"is truncated or damaged ({shown(reason)}). Download it again")


def shown(text: object, longest: int = 160) -> str:
    """One line of printable text for a message, cut at `longest` characters."""
    text = str(text)
    cut = text[:longest] + "..." * (len(text) > longest)
    return cut if cut.isprintable() else ascii(cut)


@contextlib.contextmanager
def errors_named(path: str | PathLike) -> Iterator[None]:
    """Errors about the file at `path` as CheckpointErrors that begin with its name."""
    path = Path(path)
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from error.__cause__
    except OSError as error:
        raise CheckpointError(
            f"{path.name}: could not be read ({error.strerror or type(error).__name__}): check the "
            "drive and the file's permissions"
        ) from error
