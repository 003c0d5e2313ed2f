"""All stages of the toy, one after the other by the command, on a CPU and far too short to learn.

As a command it is `python turbo_core/train.py vae data teacher rcm sla merge evaluate --preset
toy-cpu --out RUN`, which takes less than three minutes. Here
clips are smaller than the preset's; test_training_stages.py has its own.
"""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import in_comfyui  # noqa: F401 - ComfyUI comes into the process with it
import pytest
import torch
from PIL import Image
from turbodiffusion_pack.turbo_core import train
from turbodiffusion_pack.turbo_core.host import stages
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.training import command, presets

# What each leaves behind, beside checkpoints and samples.
OUTPUTS = {
    "vae": {"vae.safetensors"},
    "data": {f"{x}.safetensors" for x in ("data-00000", "unconditional", "vae")} | {"index.json"},
    "teacher": {"model.safetensors"},
    "sla": {"model.safetensors"},
    "rcm": {"model.safetensors"},
    "merge": {"model.safetensors"},
    "evaluate": {"stages.webp", "table.csv", "table.md"},
}
TRAINED = {"vae": 10, "teacher": 40, "sla": 15, "rcm": 20}  # steps
SMALL = dataclasses.replace(presets.PRESETS["toy-cpu"], latent=(2, 8, 8))


@pytest.fixture(autouse=True)
def outside_inference_mode():
    with torch.inference_mode(False):
        yield


def run(monkeypatch, *arguments: object) -> int:
    """The command's exit code."""
    line = ["train.py", *arguments, "--preset", "toy-cpu", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in line])
    return command.run(train._arguments(), lambda: stages)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_stage_runs_and_a_second_time_is_through_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(presets.PRESETS, "toy-cpu", SMALL)
    for stage, expected in OUTPUTS.items():
        assert run(monkeypatch, stage, "--out", tmp_path) == 0, capsys.readouterr().err
        told = json.loads((tmp_path / stage / "finished.json").read_text(encoding="utf-8"))
        assert set(told["outputs"]) == expected
    for stage, steps in TRAINED.items():
        log = rows(tmp_path / stage / "log.csv")
        assert [int(row["step"]) for row in log] == list(range(1, steps + 1))
        assert Image.open(tmp_path / stage / "curves.png").width > 100
    losses = [float(row["loss"]) for row in rows(tmp_path / "teacher" / "log.csv")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    examined = [row["name"] for row in rows(tmp_path / "evaluate" / "table.csv")]
    assert len(examined) == len(set(examined)) == 15
    model = load_turbo_model(str(tmp_path / "merge" / "model.safetensors"))
    assert len(model.model.diffusion_model.blocks) == 2
    capsys.readouterr()
    for stage in OUTPUTS:
        assert run(monkeypatch, stage, "--out", tmp_path) == 0
    assert capsys.readouterr().err.count(" is finished\n") >= len(OUTPUTS) - 1


@pytest.mark.parametrize("stage", OUTPUTS)
def test_a_dry_run_leaves_nothing(stage, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, stage, "--out", tmp_path / "run", "--dry-run") == 0
    told = capsys.readouterr()
    assert stage in told.out + told.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data"], "error: {out}/vae is not finished: run the stage vae with the same --out first"),
        (["sla"], "error: {out}/data is not finished: run the stage data with the same --out"),
        (["sla", "--data", "{out}/no"], "error: {out}/no has no complete data (index.json is"),
        (["merge"], "error: {out}/teacher is not finished: run the stage teacher with the same"),
        (["merge", "--base", "{out}/no.pth"], "error: {out}/sla is not finished: run the stage"),
        (["sla", "--set", "lr=fast"], "error: lr is a number such as 0.0005, got 'fast'"),
    ],
)
def test_what_is_missing_is_told_in_one_line(arguments, told, tmp_path, monkeypatch, capsys):
    arguments = [word.format(out=tmp_path) for word in arguments]
    assert run(monkeypatch, *arguments, "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith(told.format(out=tmp_path)) and error.count("\n") == 1
