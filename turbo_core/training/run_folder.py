"""The folder of one stage of a run: one run at a time, one set of settings, only whole outputs.

RUN/sla/lock               held while a run works here; the system frees it, however a run ends
RUN/sla/settings.json      what the stage was started with, binding from the first checkpoint on
RUN/sla/checkpoints/       the last two steps, see step_checkpoints.py
RUN/sla/<outputs>          appear when they are complete
RUN/sla/finished.json      comes last: outputs, their sizes, what the stage found out
"""

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from . import step_checkpoints
from .error import TrainingError, writing
from .processes import agreed, rank, say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

SETTINGS, FINISHED, LOCK = "settings.json", "finished.json", "lock"
PART = "outputs.part"
LOCKED_BYTE = 1 << 30  # Windows locks bytes, and a locked one cannot be read: one past the text
SHOWN = 5  # differences that a message lists


class RunFolder:
    """An open folder of a stage; `open` makes it.

    Attributes:
        path: RUN/<stage>.
        stage: its name.
    """

    def __init__(self, root: Path, stage: str):
        self.root, self.stage = root, stage
        self.path = root / stage

    @property
    def finished(self) -> dict | None:
        """What finished.json says, None until the stage is through."""
        return agreed(lambda: _finished(self.path))

    @property
    def settings(self) -> dict:
        """What the stage was started with; nothing if it was not."""
        path = self.path / SETTINGS
        return _read_json(path) if path.exists() else {}

    def sibling(self, stage: str) -> Path:
        """The folder of another stage of this run, which must be finished.

        Raises:
            TrainingError: it is not.
        """
        path = self.root / stage
        if agreed(lambda: _finished(path)) is None:
            raise TrainingError(
                f"{path} is not finished: run the stage {stage} with the same --out first",
                everywhere=True,
            )
        return path

    def save(self, step: int, state: dict) -> None:
        """Write a checkpoint, see step_checkpoints.save."""
        step_checkpoints.save(self.path / "checkpoints", step, state)

    def load(self, state: dict) -> int:
        """Read the newest checkpoint into `state`; its step, 0 without one."""
        return step_checkpoints.load(self.path / "checkpoints", state)

    def finish(self, write: Callable[[Path], None], **facts: object) -> None:
        """Have `write(folder)` write the outputs, then move them to RUN/<stage>/, and be finished.

        All processes call `write`, so that it may gather; the first one writes the files.

        Args:
            facts: what finished.json tells of the stage, such as measures.

        Raises:
            TrainingError: something could not be written; the checkpoints are whole.
        """
        part, problem = self.path / PART, None
        agreed(lambda: _empty(part))
        try:
            try:
                with writing(self.path):
                    write(part)
            except (ValueError, TrainingError) as error:  # the others are on their way to `agreed`
                problem = error
            agreed(lambda: _publish(part, self.path, facts, problem))
        finally:
            if rank() == 0:
                shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def open(
    root: Path, stage: str, settings: dict, since: dict[str, object] | None = None
) -> Iterator[RunFolder]:
    """Open RUN/<stage> for this run alone; made if it is new.

    Args:
        root: RUN.
        settings: all that decides what the stage computes, as json can hold it.
        since: those of them that folders of earlier versions lack, as those ran.

    Raises:
        TrainingError: another run works in it, it was started with other settings, or it cannot be
            written to.
    """
    folder = RunFolder(root, stage)
    with contextlib.ExitStack() as held:
        agreed(lambda: _take(folder.path, settings, since or {}, held))
        yield folder


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all, in place of an older one."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        step_checkpoints.sync(path.parent)


def _take(path: Path, settings: dict, since: dict, held: contextlib.ExitStack) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((path / LOCK).open("a+b"))
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written to ({error.strerror}): choose another --out"
        ) from error
    _lock(file, path)
    _compare_or_record(path / SETTINGS, json.loads(json.dumps(settings)), since)
    step_checkpoints.remove_parts(path / "checkpoints")
    shutil.rmtree(path / PART, ignore_errors=True)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read(200).decode(errors="replace").strip() or "unknown"
        raise TrainingError(
            f"{path} is in use by another run ({owner}): wait for it, stop it, or choose another "
            "--out"
        ) from error
    except OSError as error:
        say(f"{path}: its drive has no locks ({error.strerror}), so start no second run into it")
    file.truncate(0)
    file.seek(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
    file.flush()


def _compare_or_record(path: Path, settings: dict, since: dict) -> None:
    folder = path.parent
    begun = (folder / FINISHED).exists() or step_checkpoints.steps_in(folder / "checkpoints")
    if not (begun and path.exists()):  # nothing depends on what an earlier try was started with
        write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    before, now = {**since, **_flat(_read_json(path))}, _flat(settings)
    changed = [name for name in {**before, **now} if _told(before, name) != _told(now, name)]
    if changed:
        list_ = ", ".join(
            f"{name} {_told(before, name)}, now {_told(now, name)}" for name in changed[:SHOWN]
        )
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise TrainingError(
            f"{folder} was started with other settings ({list_}{more}): use those, or another --out"
        )


def _flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """{"optimizer": {"lr": 1}} as {"optimizer.lr": 1}."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _told(settings: dict, name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "not set"


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainingError(
            f"{path} is damaged ({error}): copy it back, or remove its folder and start again"
        ) from error


def _finished(path: Path) -> dict | None:
    """finished.json, if the outputs that it names are there as they were."""
    if not (path / FINISHED).exists():
        return None
    told = _read_json(path / FINISHED)
    for name, size in told["outputs"].items():
        if not (path / name).is_file() or (path / name).stat().st_size != size:
            raise TrainingError(
                f"{path / name} is missing or not what the stage wrote: copy it back, or remove "
                f"{path / FINISHED} and run the stage again"
            )
    return told


def _empty(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()


def _publish(part: Path, path: Path, facts: dict, problem: Exception | None) -> None:
    if problem:
        raise problem
    outputs = {}
    for source in sorted(file for file in part.rglob("*") if file.is_file()):
        name = source.relative_to(part)
        with writing(path / name):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, path / name)
        outputs[name.as_posix()] = (path / name).stat().st_size
    told = {"outputs": outputs, **facts}
    write_text(path / FINISHED, json.dumps(told, indent=2) + "\n")
