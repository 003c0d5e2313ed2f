"""The loop of a stage: bad batches, a stop, what a person sees of it."""

import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from dummy_training import COLUMNS, Dummy, train
from PIL import Image, ImageSequence
from turbodiffusion_pack.turbo_core.training import loop, pillow, run_folder, step_checkpoints
from turbodiffusion_pack.turbo_core.training.curves import draw_curves
from turbodiffusion_pack.turbo_core.training.error import TrainingError
from turbodiffusion_pack.turbo_core.training.learner import Learner
from turbodiffusion_pack.turbo_core.training.report import Report
from turbodiffusion_pack.turbo_core.training.video_grid import GAP, save_grid


def steps_in(root: Path) -> list[int]:
    return step_checkpoints.steps_in(root / "dummy" / "checkpoints")


def test_a_bad_batch_is_dropped_and_told(tmp_path, capsys):
    train(tmp_path, 12, 4, Dummy(bad_steps=range(6, 7)))
    assert "step 7: loss nan, gradient_norm nan, the batch was dropped\n" in capsys.readouterr().err
    weights = torch.load(tmp_path / "dummy" / "weights.pt")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_no_checkpoint_is_written_while_batches_are_bad(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(run_folder.RunFolder, "save", lambda self, step, state: saved.append(step))
    train(tmp_path, 12, 4, Dummy(bad_steps=range(6, 9)))
    assert saved == [4, 10, 12]


def test_bad_batches_without_end_are_the_end(tmp_path):
    with pytest.raises(TrainingError) as error:
        train(tmp_path, 40, 4, Dummy(bad_steps=range(9, 40)))
    told = str(error.value)
    assert told.startswith("the last 10 batches, up to step 19, gave loss nan, gradient_norm nan: ")
    assert "\n" not in told
    assert steps_in(tmp_path) == [4, 8]
    weights = Dummy()
    step_checkpoints.load(tmp_path / "dummy" / "checkpoints", weights.state)
    assert all(tensor.isfinite().all() for tensor in weights.weights().values())


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_dropped_batch_changes_nothing(bad):
    """One number of one gradient is enough; momentum and weight decay would go on by themselves."""
    learner, spared = (Learner(torch.nn.Linear(3, 3), (0.9, 0.99), 0.1, 0.1) for _ in range(2))
    spared.network.load_state_dict(learner.network.state_dict())
    for n in range(6):
        weight, bias = learner.weights
        weight.grad, bias.grad = torch.full((3, 3), n + 1.0), torch.full((3,), 2.0)
        if n in (3, 4):
            weight.grad[1, 2] = bad
            before = everything(learner)
            assert not learner.update(0.1, n).isfinite()
            assert all(map(torch.equal, everything(learner), before))
            continue
        for twin, own in zip(spared.weights, learner.weights, strict=True):
            twin.grad = own.grad.clone()
        assert learner.update(0.1, n).item() == pytest.approx((9 * (n + 1) ** 2 + 12) ** 0.5)
        spared.update(0.1, n)
    assert all(map(torch.equal, everything(learner), everything(spared)))
    assert learner.optimizer.state[learner.weights[0]]["step"] == 4


def everything(learner: Learner) -> list[torch.Tensor]:
    """Copies of the weights, the average, both moments and the counts."""
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    return [t.detach().clone() for t in (*learner.weights, *learner.ema.tensors, *moments)]


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot interrupt itself there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_writes_a_checkpoint_and_the_next_run_goes_on(tmp_path, number, capsys):
    def stopped_step(n: int) -> dict:
        if n == 5:
            os.kill(os.getpid(), number)
        return step(n)

    before = signal.getsignal(number)
    dummy = Dummy()
    step, dummy.step = dummy.step, stopped_step
    with pytest.raises(loop.Stopped, match="stopped at step 6: the same command goes on"):
        train(tmp_path, 12, 100, dummy)
    assert signal.getsignal(number) == before
    assert steps_in(tmp_path) == [6]
    resumed, whole = Dummy(), Dummy()
    train(tmp_path, 12, 100, resumed)
    assert "going on from step 6 of 12" in capsys.readouterr().err
    train(tmp_path / "whole", 12, 100, whole)
    assert all(torch.equal(resumed.weights()[n], whole.weights()[n]) for n in whole.weights())


def test_progress_names_rate_and_remaining_time(tmp_path, capsys):
    train(tmp_path, 6, 100, Dummy())
    told = capsys.readouterr().err
    assert "step 3 of 6, " in told and " steps/s, 0 min 00 s left, loss " in told
    assert "gradient_norm" in told


def test_curves(tmp_path):
    rows = [{"step": n, "loss": 100.0 * 0.9**n, "seconds": 1.0} for n in range(1, 100)]
    rows[50]["loss"] = math.nan
    draw_curves(tmp_path / "curves.png", rows, ["loss", "fake"])
    picture = Image.open(tmp_path / "curves.png")
    assert picture.size == (1120, 220)
    columns = ({picture.getpixel((x, y)) for y in range(220)} for x in range(560))
    blue = [colours for colours in columns if (20, 70, 140) in colours]
    assert len(blue) > 500  # the line spans its panel
    draw_curves(tmp_path / "curves.png", [], COLUMNS)  # at the very start


def test_a_grid_of_videos_moves(tmp_path):
    videos = torch.zeros(3, 5, 8, 12, 3)
    for t in range(5):
        videos[1, t, :, :, 0] = t / 4
    save_grid(tmp_path / "samples" / "step", videos)
    (path,) = (tmp_path / "samples").iterdir()
    frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(path))]
    assert len(frames) == 5 and frames[0].size == (2 * 12 + GAP, 2 * 8 + GAP)
    reds = [frame.getpixel((12 + GAP + 6, 4))[0] for frame in frames]
    assert reds[0] < 30 and reds[-1] > 225 and reds == sorted(reds)


def test_a_grid_that_may_not_be_large_is_saved_at_a_lower_quality(tmp_path):
    videos = torch.rand(2, 3, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    save_grid(tmp_path / "best", videos)
    best = (tmp_path / "best.webp").stat().st_size
    save_grid(tmp_path / "small", videos, most=best - 1)
    assert 0.4 * best < (tmp_path / "small.webp").stat().st_size < best
    assert Image.open(tmp_path / "small.webp").n_frames == 3
    save_grid(tmp_path / "least", videos, most=1)  # the worst, rather than none
    assert (tmp_path / "least.webp").exists()


def test_without_pillow_it_says_so_once_and_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pillow, "Image", None)
    monkeypatch.setattr(pillow, "_said", set())
    train(tmp_path, 12, 4, Dummy())
    assert capsys.readouterr().err.count("need Pillow") == 1
    assert not (tmp_path / "dummy" / "curves.png").exists()


def test_a_picture_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pillow, "_said", set())
    (tmp_path / "dummy" / "curves.png" / "in the way").mkdir(parents=True)
    train(tmp_path, 12, 4, Dummy())
    assert capsys.readouterr().err.count("curves.png could not be written") == 1
    assert steps_in(tmp_path) == [8, 12]


def test_a_value_without_a_column(tmp_path):
    report = Report(tmp_path, ["loss"], steps=2)
    report.resume(0)
    with pytest.raises(ValueError, match="los is no column, those are loss"):
        report.log(1, los=1.0)
