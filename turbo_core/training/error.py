"""The one error of a training run that is the user's to read."""


class TrainingError(RuntimeError):
    """Training cannot start or go on: the message says what is wrong, what was found, what to do.

    Attributes:
        everywhere: whether all processes of the run raised it alike, so that one may speak for all.
    """

    def __init__(self, message: str, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere
