"""`python turbo_core/train.py`: what a stage's errors look like, and its exit codes."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from turbodiffusion_pack.turbo_core import train
from turbodiffusion_pack.turbo_core.training import command, processes, run_folder
from turbodiffusion_pack.turbo_core.training.error import TrainingError
from turbodiffusion_pack.turbo_core.training.loop import Stopped
from turbodiffusion_pack.turbo_core.training.loop import train as train_loop
from turbodiffusion_pack.turbo_core.training.report import Report
from turbodiffusion_pack.turbo_core.training.toy import recipe

ROOT = Path(__file__).resolve().parents[2]
ARGS = argparse.Namespace(stages=["sla"], device="cpu")


def run(stage) -> int:
    return command.run(ARGS, lambda: SimpleNamespace(STAGES={"sla": stage}))


def fails(error: Exception):
    def stage(args, device):
        raise error

    return stage


def test_a_stage_gets_arguments_and_device():
    got = []
    assert run(lambda args, device: got.append((args, device))) == 0
    assert got == [(ARGS, torch.device("cpu"))]


@pytest.mark.parametrize(
    ("error", "told", "code"),
    [
        (TrainingError("no such data: make it"), "error: no such data: make it", 1),
        (ValueError("two\nlines"), "error: two lines", 1),
        (FileNotFoundError(2, "No file", "a.pth"), "error: [Errno 2] No file: 'a.pth'", 1),
        (Stopped("stopped at step 3"), "stopped at step 3", 130),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"),
            "error: the GPU's memory is full (CUDA out of memory): --dry-run tells what the stage "
            "needs; use a smaller batch, or more GPUs with torchrun",
            1,
        ),
    ],
)
def test_an_error_is_one_sentence(error, told, code, capsys):
    assert run(fails(error)) == code
    assert capsys.readouterr().err == told + "\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError):
        run(fails(KeyError("lr")))


def test_the_first_process_speaks_for_all(monkeypatch, capsys):
    monkeypatch.setattr(command, "rank", lambda: 3)
    assert run(fails(TrainingError("the disk is full", everywhere=True))) == 1
    assert capsys.readouterr().err == ""
    assert run(fails(TrainingError("only here"))) == 1
    assert capsys.readouterr().err == "error in process 3: only here\n"


def test_a_gpu_that_is_not_there(capsys):
    args = argparse.Namespace(stages=["sla"], device="cuda:99")
    assert command.run(args, lambda: SimpleNamespace(STAGES={"sla": None})) == 1
    assert capsys.readouterr().err.startswith("error: GPU 99 is asked for, this machine has ")


def test_agreed_errors_come_back_in_one_sentence():
    with pytest.raises(TrainingError, match="no space") as error:
        processes.agreed(lambda: (_ for _ in ()).throw(OSError("no space")))
    assert error.value.everywhere


def test_help_needs_neither_torch_nor_comfyui():
    """-S leaves out all that is installed."""
    command_line = [sys.executable, "-S", str(ROOT / "turbo_core" / "train.py"), "--help"]
    done = subprocess.run(command_line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "{vae,data,teacher,rcm,sla,merge,evaluate}" in done.stdout


def test_stages_run_one_after_the_other_until_one_fails():
    """And what was compiled for one is gone before the next."""
    done, compiled = [], []
    twice = torch.compile(lambda x: 2 * x, backend=lambda graph, _: compiled.append(0) or graph)

    def stage(args, device):
        done.append(float(twice(torch.ones(2))[0]))
        if len(done) == 3:
            raise TrainingError("the disk is full")

    args = argparse.Namespace(stages=["sla", "rcm", "merge", "sla"], device="cpu")
    stages = SimpleNamespace(STAGES=dict.fromkeys(("sla", "rcm", "merge"), stage))
    with torch.inference_mode(False):
        assert command.run(args, lambda: stages) == 1
    assert done == [2.0] * 3 and len(compiled) == 3


@pytest.mark.parametrize("extra", [["--steps", "3"], ["--set", "lr=1"]])
def test_a_stages_numbers_are_given_to_it_alone(extra, monkeypatch, capsys):
    line = ["train.py", "--preset", "toy", "--out", "run", *extra]
    monkeypatch.setattr(sys, "argv", [*line, "sla"])
    assert train._arguments().stages == ["sla"]
    monkeypatch.setattr(sys, "argv", [*line, "rcm", "sla"])
    with pytest.raises(SystemExit):
        train._arguments()
    assert "are of one stage" in capsys.readouterr().err


@pytest.mark.parametrize("stages", [["data", "sla"], ["rcm", "teacher"]])
def test_a_base_means_one_thing(stages, monkeypatch, capsys):
    line = ["train.py", "--preset", "toy", "--out", "run", "--base", "wan.pth"]
    monkeypatch.setattr(sys, "argv", [*line, "rcm", "sla", "merge"])
    assert train._arguments().base == Path("wan.pth")
    monkeypatch.setattr(sys, "argv", [*line, *stages])
    with pytest.raises(SystemExit):
        train._arguments()
    assert "--base is not the same" in capsys.readouterr().err


def test_a_stage_leaves_no_settings_to_the_next():
    seen = []

    def settings():
        return (
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    def stage(args, device):
        seen.append(settings())
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        if len(seen) == 2:
            raise TrainingError("the disk is full")

    before = settings()
    args = argparse.Namespace(stages=["sla", "sla", "sla"], device="cpu")
    assert command.run(args, lambda: SimpleNamespace(STAGES={"sla": stage})) == 1
    assert seen == [before, before] and settings() == before


def test_a_stage_of_one_process_is_refused_before_the_first(monkeypatch, capsys):
    monkeypatch.setattr(recipe, "grouped", lambda: True)
    done = []
    stages = SimpleNamespace(STAGES={"sla": lambda args, device: done.append("sla")})
    args = argparse.Namespace(stages=["sla", "evaluate"], device="cpu")
    assert command.run(args, lambda: stages) == 1 and not done
    assert "the stage evaluate uses one GPU" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot interrupt itself there")
def test_no_stage_begins_after_a_stop(tmp_path, capsys):
    """Even one in the last step of the stage before, which the same command then ends."""

    def stage(name, kill):
        def run_it(args, device):
            with run_folder.open(tmp_path, name, {}) as folder:

                def step(n):
                    done.append(name)
                    if kill and n == 1:
                        os.kill(os.getpid(), signal.SIGINT)
                    return {"loss": torch.zeros(())}

                train_loop(folder, Report(folder.path, ["loss"], 2), {"w": torch.zeros(2)}, step, 9)
                folder.finish(lambda part: (part / "weights").write_text("w"))

        return run_it

    args = argparse.Namespace(stages=["sla", "rcm"], device="cpu")
    for kill, code, expected in ((True, 130, ["sla"] * 2), (False, 0, ["rcm"] * 2)):
        done = []
        stages = SimpleNamespace(STAGES={"sla": stage("sla", kill), "rcm": stage("rcm", False)})
        assert command.run(args, lambda stages=stages: stages) == code
        assert done == expected
    assert "stopped at step 2: the same command goes on from there\n" in capsys.readouterr().err
