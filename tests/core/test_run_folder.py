"""A run's folder: one run at a time, the same settings, whole outputs, exact resume when killed."""

import csv
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import dummy_training
import pytest
import torch
from dummy_training import (
    COLUMNS,
    Dummy,
    die_at,
    finish_without_room,
    started,
    train,
    train_dummy,
    train_with_little_room,
)
from turbodiffusion_pack.turbo_core.training import run_folder, step_checkpoints
from turbodiffusion_pack.turbo_core.training.error import TrainingError
from turbodiffusion_pack.turbo_core.training.report import Report

STEPS, SAVE_EVERY = 120, 7
SETTINGS = {"steps": 10, "optimizer": {"lr": 1e-5, "betas": [0.9, 0.999]}}


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


def test_killed_at_random_moments_it_ends_with_the_same_weights(whole, tmp_path):
    chance, kills = random.Random(), 0
    for _ in range(5):
        run, before = started(train_dummy, str(tmp_path), STEPS, SAVE_EVERY), steps_in(tmp_path)
        while steps_in(tmp_path) == before and run.is_alive():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.1))
        run.kill()
        run.join()
        kills += run.exitcode != 0
    train(tmp_path, STEPS, SAVE_EVERY, Dummy())
    assert kills >= 3
    assert_same(tmp_path, whole)


def test_killed_before_any_change_on_disk_it_ends_with_the_same_weights(tmp_path):
    train(tmp_path / "whole", 3, 1, Dummy())
    event = 0
    while True:
        event += 1
        run = started(die_at, event, str(tmp_path / str(event)))
        run.join()
        if run.exitcode == 0:
            break
        assert run.exitcode in (-9, signal.SIGTERM)
        for checkpoint in (tmp_path / str(event)).glob("dummy/checkpoints/step-????????"):
            assert {file.name for file in checkpoint.iterdir()} == {".metadata", "__0_0.distcp"}
        train(tmp_path / str(event), 3, 1, Dummy())
        assert_same(tmp_path / str(event), tmp_path / "whole")
    assert event > 30  # as many moments to die in


def assert_same(root: Path, whole: Path) -> None:
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(root)[name], tensor), name
    assert rows(root) == rows(whole)
    assert [int(row["step"]) for row in rows(root)] == list(range(1, len(rows(root)) + 1))


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
        told = rf"in use by another run \(process {os.getpid()}"
        with pytest.raises(TrainingError, match=told), run_folder.open(tmp_path, "sla", SETTINGS):
            pass
        with run_folder.open(tmp_path, "rcm", SETTINGS):  # the stages beside each other
            pass
    with run_folder.open(tmp_path, "sla", SETTINGS):
        pass


def test_other_settings_are_named(tmp_path):
    """Once there is something that was made with the first ones."""
    for settings in ({"steps": 7}, SETTINGS):
        with run_folder.open(tmp_path, "sla", settings):
            pass
    make_checkpoints(tmp_path / "sla" / "checkpoints", 1)
    other = {"steps": 10, "optimizer": {"lr": 2e-5, "betas": (0.9, 0.999)}, "seed": 1}
    expected = r"\(optimizer.lr 1e-05, now 2e-05, seed not set, now 1\)"
    with pytest.raises(TrainingError, match=expected), run_folder.open(tmp_path, "sla", other):
        pass


def test_a_sibling_must_be_finished(tmp_path):
    refused = pytest.raises(TrainingError, match="teacher is not finished: run the stage teacher")
    with run_folder.open(tmp_path, "sla", SETTINGS) as folder, refused:
        folder.sibling("teacher")
    with run_folder.open(tmp_path, "teacher", SETTINGS) as folder:
        assert folder.finished is None
        folder.finish(lambda path: (path / "a.txt").write_text("a"), colour=0.97)
        assert folder.finished == {"outputs": {"a.txt": 1}, "colour": 0.97}
        assert folder.sibling("teacher") == tmp_path / "teacher"
    (tmp_path / "teacher" / "a.txt").unlink()
    refused = pytest.raises(TrainingError, match=r"a.txt is missing or not what the stage wrote")
    with run_folder.open(tmp_path, "sla", SETTINGS) as folder, refused:
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


def test_a_disk_that_is_full_at_the_end_is_told_by_all_processes_alike(tmp_path):
    """None waits for another, and one sentence is told (errors that are everywhere are)."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    runs = [started(finish_without_room, place, port, str(tmp_path)) for place in range(2)]
    for run in runs:
        run.join(120)
        assert run.exitcode == 0
    first, second = ((tmp_path / f"told-{place}").read_text() for place in range(2))
    assert first == second
    assert first.startswith(f"True: {tmp_path / 'dummy'} could not be written (No space left on")
    assert not (tmp_path / "dummy" / "finished.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_keeps_the_older_checkpoint(tmp_path):
    dummy = Dummy(width=4000)
    real, dummy.step = dummy.step, lambda n: {"loss": 1 / (10 - n), "gradient_norm": 1.0}
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, 20, 5, dummy)
    assert steps_in(tmp_path) == [5, 10]
    started(train_with_little_room, str(tmp_path), str(tmp_path / "told")).join()
    assert (tmp_path / "told").read_text() == (
        "the checkpoint of step 15 could not be written (File too large), the one of step 10 is "
        f"whole: free some space in {tmp_path / 'dummy' / 'checkpoints'} and start the same "
        "command again"
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
    with pytest.raises(TrainingError, match=r"no checkpoint in .* can be read"):
        step_checkpoints.load(folder, dummy.state)


@pytest.mark.parametrize("width", [16, None])
def test_a_checkpoint_of_another_network(tmp_path, width):
    folder = make_checkpoints(tmp_path, 5)
    state = Dummy(width or 8).state
    if width is None:
        del state["student_average"]["0.bias"]
    with pytest.raises(TrainingError, match="is of another network or optimizer"):
        step_checkpoints.load(folder, state)
    assert step_checkpoints.steps_in(folder) == [5]


def test_nothing_is_pickled_into_a_checkpoint(tmp_path):
    dummy = Dummy()
    with pytest.raises(TypeError, match=r"all\.student is a Trained, which no checkpoint holds"):
        step_checkpoints.save(tmp_path, 5, {"all": dummy.state})


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


def test_half_a_row_is_no_row(tmp_path):
    report = Report(tmp_path, ["loss"], steps=20, every=2)
    report.resume(0)
    for step in range(1, 11):
        report.log(step, loss=1.0)
    with (tmp_path / "log.csv").open("a") as file:
        file.write("1")  # the first letter of row 11
    report.resume(10)
    assert [row["step"] for row in report.rows] == list(range(1, 11))


def test_a_log_that_cannot_be_written(tmp_path):
    report = Report(tmp_path, ["loss"], steps=20, every=1)
    report.resume(0)
    (tmp_path / "log.csv").unlink()
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(TrainingError, match=r"log.csv could not be written \(Is a directory\)"):
        report.log(1, loss=1.0)


def test_settings_that_are_damaged(tmp_path):
    with run_folder.open(tmp_path, "sla", SETTINGS) as folder:
        folder.finish(lambda path: None)
    (tmp_path / "sla" / "settings.json").write_text("{")
    refused = pytest.raises(TrainingError, match=r"settings.json is damaged")
    with refused, run_folder.open(tmp_path, "sla", SETTINGS):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")
def test_two_processes_go_on_from_one(tmp_path):
    """FSDP2 shards what one process saved, and both end with the same weights as one, though only
    one of them had the batch that all have to drop."""
    whole, dummy = Dummy(bad_steps=[9]), Dummy()
    train(tmp_path / "whole", 12, 3, whole)
    real, dummy.step = dummy.step, lambda n: real(n) if n < 7 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, 12, 3, dummy)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [str(Path(dummy_training.__file__)), str(tmp_path), "12", "3", "9"]
    run = subprocess.run([*torchrun, *arguments], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("going on from step 6 of 12") == 1  # one speaks for both
    assert run.stderr.count("step 10: loss nan, gradient_norm nan, the batch was dropped") == 1
    newest = tmp_path / "dummy" / "checkpoints" / "step-00000012"
    assert {path.name for path in newest.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor)
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, 13))
