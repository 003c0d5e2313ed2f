"""Plays video files."""

from pathlib import Path

import av


def play(video: Path) -> tuple[int, int, int]:
    """Decode the whole file: number of frames, width, height."""
    with av.open(video) as container:
        frames = list(container.decode(video=0))
    return len(frames), frames[0].width, frames[0].height
