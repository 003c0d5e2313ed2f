"""Files in the models folder as inputs: from the list, typed by a client, or linked."""

import contextlib
import os.path
from collections.abc import Iterator
from typing import NamedTuple

import folder_paths
from comfy_api.latest import io

from ..turbo_core.checkpoint import CheckpointError


class Folder(NamedTuple):
    """One of the host's folders of model files, and what a user is told to put there."""

    name: str
    wanted: str


CHECKPOINTS = Folder("diffusion_models", "a TurboDiffusion checkpoint")
LORAS = Folder("loras", "a LoRA for Wan")


class FileInput(io.Combo.Input):
    """A combo of the files that the host lists, which a STRING may be linked to as well."""

    def __init__(self, folder: Folder, *args, first: tuple[str, ...] = (), **kwargs):
        super().__init__(*args, options=[*first, *_listed(folder)], **kwargs)

    def get_io_type(self):
        return _ComboOrString(super().get_io_type())


class _ComboOrString(str):
    """ "COMBO" to all who read it, while the host, which asks a type what it is not, links more."""

    def __ne__(self, received):
        # A list is the type of older nodes' combos.
        return not isinstance(received, list) and received not in ("COMBO", "STRING", "*")


def listed_or_why_not(folder: Folder, name: object, instead: str = "") -> bool | str:
    """What validate_inputs returns of the file called `name`: True, or what is wrong.

    None is right: so an input is called that is linked, whose value is known when the node runs, or
    missing, which the host tells. `instead` is what else a user may do. The host writes the input's
    name before it.
    """
    if name is None or (isinstance(name, str) and os.path.normpath(name) in _listed(folder)):
        return True
    return _not_there(folder, name, instead)


def file_path(folder: Folder, input_name: str, name: object, instead: str = "") -> str:
    """Where the file called `name` is. A link may bring anything.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder_paths.get_full_path(folder.name, name) if isinstance(name, str) else None
    if path is None:
        raise FileNotFoundError(f"{input_name} {_not_there(folder, name, instead)}")
    return path


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """What is wrong with a file as a ValueError of the same words.

    Beside the words the host shows a user the type, and of any but Python's own types where its
    class is, down to the folder that this pack lies in.
    """
    try:
        yield
    except CheckpointError as error:
        raise ValueError(str(error)) from error.__cause__


def _listed(folder: Folder) -> list[str]:
    return folder_paths.get_filename_list(folder.name)


def _not_there(folder: Folder, name: object, instead: str) -> str:
    return (
        f"{repr(name)[:200]} is not in models/{folder.name}. Put {folder.wanted} there and press R "
        f"to refresh the list{instead}."
    )
