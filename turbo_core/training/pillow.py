"""Pillow, which ComfyUI requires: pictures are written with it, or not at all and that said."""

import os
from collections.abc import Callable
from pathlib import Path

from .processes import say

try:
    from PIL import Image, ImageDraw, ImageFont, features
except ImportError:
    Image = ImageDraw = ImageFont = features = None

_said = set()


def has_pillow() -> bool:
    """Whether pictures can be written; says once that they cannot."""
    if Image is None:
        _say_once("no pictures of this run are written: they need Pillow (pip install pillow)")
    return Image is not None


def write_picture(path: Path, save: Callable[[Path], None]) -> None:
    """Have `save(part)` write the picture beside `path`, and give it its name when it is whole.

    A picture is worth no run: one that cannot be written (a viewer holds it open on Windows, the
    disk is full) is told once.
    """
    part = path.with_name("part-" + path.name)
    try:
        path.parent.mkdir(exist_ok=True)
        save(part)
        os.replace(part, path)
    except OSError as error:
        _say_once(f"{path} could not be written ({error.strerror or error}), training goes on")


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        say(text)
