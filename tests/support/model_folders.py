"""Folders of models that ComfyUI looks into for as long as a test needs them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def listed(kind: str, folder: Path) -> Iterator[None]:
    """While this lasts ComfyUI's loaders of `kind`, such as "loras", find the files of `folder`."""
    import folder_paths

    folder_paths.add_model_folder_path(kind, str(folder))
    try:
        yield
    finally:
        folder_paths.folder_names_and_paths[kind][0].remove(str(folder))
        # What it has listed it compares with the folder's time, and the folder may go now.
        folder_paths.filename_list_cache.pop(kind, None)
