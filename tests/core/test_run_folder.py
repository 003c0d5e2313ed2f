"""A run's folder: one run at a time, the same settings, whole outputs, exact resume after kill -9."""

import csv
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dummy_training import COLUMNS, Dummy, train
from turbodiffusion_pack.turbo_core.training import run_folder, step_checkpoints
from turbodiffusion_pack.turbo_core.training.error import TrainingError
from turbodiffusion_pack.turbo_core.training.report import Report

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "dummy_training.py"
STEPS, SAVE_EVERY = 400, 7
SETTINGS = {"steps": 10, "optimizer": {"lr": 1e-5, "betas": [0.9, 0.999]}}


def start(root: Path, steps: int = STEPS) -> subprocess.Popen:
    arguments = [sys.executable, str(SCRIPT), str(root), str(steps), str(SAVE_EVERY)]
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "dummy" / "log.csv").open(newline="") as file:
        return [{n: row[n] for n in ("step", *COLUMNS)} for row in csv.DictReader(file)]


def steps_in(root: Path) -> list[int]:
    return step_checkpoints.steps_in(root / "dummy" / "checkpoints")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    root = tmp_path_factory.mktemp("whole")
    train(root, STEPS, SAVE_EVERY, Dummy())
    return root


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "dummy" / "weights.pt")


def test_killed_at_any_moment_it_ends_with_the_same_weights(whole, tmp_path):
    """Six kills at random moments between the first checkpoint and the end."""
    chance, kills = random.Random(), 0
    for _ in range(30):
        run = start(tmp_path)
        if kills < 6:
            deadline, before = time.monotonic() + 60, steps_in(tmp_path)
            while steps_in(tmp_path) == before and run.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.15))
            run.kill()
        _, errors = run.communicate(timeout=120)
        kills += run.returncode != 0
        if run.returncode == 0:
            break
        assert run.returncode in (-signal.SIGKILL, 1) and "Error" not in errors, errors
    assert kills >= 3
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(tmp_path)[name], tensor), name
    assert rows(tmp_path) == rows(whole)
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, STEPS + 1))


def test_a_finished_stage_returns_at_once(whole):
    dummy = Dummy()
    dummy.step = None
    train(whole, STEPS, SAVE_EVERY, dummy)


def test_the_last_two_checkpoints_are_kept(whole):
    assert steps_in(whole) == [STEPS // SAVE_EVERY * SAVE_EVERY, STEPS]
    names = {path.name for path in (whole / "dummy").iterdir()}
    expected = {"lock", "settings.json", "checkpoints", "log.csv", "weights.pt", "finished.json"}
    assert names - {"curves.png"} == expected


def test_two_runs_into_one_folder(tmp_path):
    with run_folder.open(tmp_path, "sla", SETTINGS):
        with pytest.raises(TrainingError, match=rf"in use by another run \(process {os.getpid()}"):
            with run_folder.open(tmp_path, "sla", SETTINGS):
                pass
        with run_folder.open(tmp_path, "rcm", SETTINGS):  # the stages beside each other
            pass
    with run_folder.open(tmp_path, "sla", SETTINGS):
        pass


def test_other_settings_are_named(tmp_path):
    with run_folder.open(tmp_path, "sla", SETTINGS):
        pass
    other = {"steps": 10, "optimizer": {"lr": 2e-5, "betas": (0.9, 0.999)}, "seed": 1}
    expected = r"\(optimizer.lr 1e-05, now 2e-05, seed not set, now 1\)"
    with pytest.raises(TrainingError, match=expected):
        with run_folder.open(tmp_path, "sla", other):
            pass


def test_a_sibling_must_be_finished(tmp_path):
    with run_folder.open(tmp_path, "sla", SETTINGS) as folder:
        with pytest.raises(TrainingError, match="teacher is not finished: run the stage teacher"):
            folder.sibling("teacher")
    with run_folder.open(tmp_path, "teacher", SETTINGS) as folder:
        assert folder.finished is None
        folder.finish(lambda path: (path / "a.txt").write_text("a"), colour=0.97)
        assert folder.finished == {"outputs": {"a.txt": 1}, "colour": 0.97}
        assert folder.sibling("teacher") == tmp_path / "teacher"
    (tmp_path / "teacher" / "a.txt").unlink()
    with run_folder.open(tmp_path, "sla", SETTINGS) as folder:
        with pytest.raises(TrainingError, match=r"a.txt is missing or not what the stage wrote"):
            folder.sibling("teacher")


def test_outputs_that_cannot_be_written_leave_none(tmp_path):
    def full(path: Path) -> None:
        (path / "first.txt").write_text("whole")
        raise OSError(28, "No space left on device")

    with run_folder.open(tmp_path, "sla", SETTINGS) as folder:
        with pytest.raises(TrainingError, match=r"could not be written \(No space left on device"):
            folder.finish(full)
        assert folder.finished is None
        assert {p.name for p in folder.path.iterdir()} == {"lock", "settings.json"}


FULL = """
import resource, sys
sys.path.append({support!r})
from pathlib import Path
import dummy_training
from turbodiffusion_pack.turbo_core.training.error import TrainingError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    dummy_training.train(Path({root!r}), 20, 5, dummy_training.Dummy(width=4000))
except TrainingError as error:
    sys.exit(str(error))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    """The same run first without, then with a limit on what it may write."""
    dummy = Dummy(width=4000)
    real, dummy.step = dummy.step, lambda n: {"loss": 1 / (10 - n), "gradient_norm": 1.0}
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, 20, 5, dummy)
    assert steps_in(tmp_path) == [5, 10]
    script = FULL.format(support=str(SCRIPT.parent), root=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(
        "the checkpoint of step 15 could not be written (File too large), the one of step 10 is "
        f"whole: free some space in {tmp_path / 'dummy' / 'checkpoints'}"
    )
    assert steps_in(tmp_path) == [5, 10]
    assert not list((tmp_path / "dummy" / "checkpoints").glob("*.part"))
    dummy.step = real
    train(tmp_path, 20, 5, dummy)
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, 21))


def make_checkpoints(root: Path, *steps: int) -> Path:
    dummy = Dummy()
    for step in steps:
        dummy.average["0.bias"].fill_(step)
        step_checkpoints.save(root, step, dummy.state)
    return root


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    folder = make_checkpoints(tmp_path, 5, 10)
    data = folder / "step-00000010" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:1000])
    dummy = Dummy()
    assert step_checkpoints.load(folder, dummy.state) == 5
    assert (dummy.average["0.bias"] == 5).all()
    assert "step-00000010 is damaged" in capsys.readouterr().err
    for file in (folder / "step-00000005").iterdir():
        file.write_bytes(b"")
    with pytest.raises(TrainingError, match="no checkpoint in .* can be read"):
        step_checkpoints.load(folder, dummy.state)


@pytest.mark.parametrize("width", [16, None])
def test_a_checkpoint_of_another_network(tmp_path, width):
    folder = make_checkpoints(tmp_path, 5)
    other = Dummy(width or 8)
    if width is None:
        del other.average["0.bias"]
    with pytest.raises(TrainingError, match="is of another network or optimizer"):
        step_checkpoints.load(folder, other.state)
    assert step_checkpoints.steps_in(folder) == [5]


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_checkpoint_calls_nothing_that_it_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = make_checkpoints(tmp_path, 5, 10, 15)
    (folder / "step-00000015" / ".metadata").write_bytes(pickle.dumps(Evil()))
    data = folder / "step-00000010" / "__0_0.distcp"
    raw = data.read_bytes()
    assert step_checkpoints.load(folder, Dummy().state) == 10
    assert "its description names" in capsys.readouterr().err
    assert not (tmp_path / "evil").exists()
    assert data.read_bytes() == raw


def test_rows_of_steps_that_are_made_again_are_dropped(tmp_path):
    report = Report(tmp_path, ["loss", "fake_loss"], steps=10, every=2)
    report.resume(0)
    for step in range(1, 6):
        report.log(step, **{"loss" if step % 2 else "fake_loss": torch.tensor(float(step))})
    report.flush()
    with (tmp_path / "log.csv").open("a") as file:
        file.write("6,0.")  # killed while it wrote
    again = Report(tmp_path, ["loss", "fake_loss"], steps=10, every=2)
    again.resume(3)
    assert [(row["step"], row.get("loss"), row.get("fake_loss")) for row in again.rows] == [
        (1, 1.0, None), (2, None, 2.0), (3, 3.0, None)
    ]  # fmt: skip
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 4


def test_settings_that_are_damaged(tmp_path):
    with run_folder.open(tmp_path, "sla", SETTINGS):
        pass
    (tmp_path / "sla" / "settings.json").write_text("{")
    with pytest.raises(TrainingError, match=r"settings.json is damaged"):
        with run_folder.open(tmp_path, "sla", SETTINGS):
            pass
    assert json.dumps(SETTINGS)
