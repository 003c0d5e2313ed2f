"""The one error of the reader, and how untrusted text is shown in it."""


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
