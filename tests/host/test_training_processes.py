"""Two processes that share a network by FSDP2, beside one process with the same batch."""

import argparse
import csv
import socket
import time
from multiprocessing import Process
from pathlib import Path

import comfyui_install
import fresh_process
import in_comfyui  # noqa: F401 - ComfyUI comes into the process with it
import pytest
import tiny_data
import torch
from safetensors.torch import load_file, save_file
from turbodiffusion_pack.turbo_core.host.stages import STAGES
from turbodiffusion_pack.turbo_core.training import step_checkpoints
from turbodiffusion_pack.turbo_core.training.initial_weights import initial_weights
from turbodiffusion_pack.turbo_core.training.presets import PRESETS

COMMAND = Path(__file__).resolve().parents[2] / "turbo_core" / "train.py"
SETTINGS = {
    # The student, twice by consistency alone, then with its scores; the fake score twice.
    "rcm": ["steps=5", "consistency_only=2", "every=3"],
    "sla": ["steps=2", "after_rcm=True"],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with data, a base that nothing of is zero and a student that is near it."""
    folder, preset = tmp_path_factory.mktemp("inputs"), PRESETS["toy-cpu"]
    tiny_data.write(folder / "latents", preset.latent)
    generator = torch.Generator().manual_seed(1)
    weights = initial_weights(preset.sizes, 0, preset.text_channels)
    weights["head.head.weight"].normal_(std=0.05, generator=generator)
    save_file(weights, folder / "base.safetensors")
    near = {n: w + 0.01 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    save_file(near, folder / "student.safetensors")
    return folder


def arguments(root: Path, inputs: Path, stage: str) -> argparse.Namespace:
    return argparse.Namespace(
        preset="toy-cpu", out=root, data=inputs / "latents", base=inputs / "base.safetensors",
        rcm=inputs / "student.safetensors", set=["micro_batch=2", "save_every=1", *SETTINGS[stage]],
        steps=None, seed=0, dry_run=False,
    )  # fmt: skip


def start(root: Path, inputs: Path, stage: str, count: int) -> list[Process]:
    """The command's `count` processes, as torchrun starts them."""
    args = arguments(root, inputs, stage)
    words = [stage, "--preset", args.preset, "--out", args.out, "--data", args.data]
    words += ["--base", args.base, "--rcm", args.rcm]
    words += ["--comfyui", comfyui_install.find(), "--device", "cpu"]
    words += [word for setting in args.set for word in ("--set", setting)]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"TORCHELASTIC_RUN_ID": "test"}
    command = [str(COMMAND), *map(str, words)]
    return [
        fresh_process.start(
            command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, told_by(root, rank)
        )
        for rank in range(count)
    ]


def told_by(root: Path, rank: int) -> Path:
    """What that process writes to stderr."""
    return root.with_name(f"told-{rank}.txt")


def finish(root: Path, runs: list[Process]) -> None:
    for rank, run in enumerate(runs):
        run.join(300)
        assert run.exitcode == 0, told_by(root, rank).read_text()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{n: v for n, v in row.items() if n != "seconds"} for row in csv.DictReader(file)]


def train_alone(root: Path, inputs: Path, stage: str) -> None:
    with torch.inference_mode(False):
        STAGES[stage](arguments(root, inputs, stage), torch.device("cpu"))


def assert_alike(one: Path, two: Path, base: Path) -> None:
    """Weights and log of two folders of a stage, but for rounding."""
    starts = load_file(base)
    wanted, found = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert wanted.keys() == found.keys() >= starts.keys()
    for name in wanted:
        update, other = (made[name] - starts.get(name, 0) for made in (wanted, found))
        assert (update - other).norm() <= 0.02 * update.norm() + 1e-7, name
    for wanted, found in zip(rows(one), rows(two), strict=True):
        assert wanted.keys() == found.keys()
        for column, value in wanted.items():
            assert (value == "") == (found[column] == ""), column
            if value:
                assert float(found[column]) == pytest.approx(float(value), rel=1e-3), column


def test_killed_and_started_again_two_learn_what_one_learns(inputs, tmp_path):
    together = start(tmp_path / "two", inputs, "rcm", 2)
    checkpoints = tmp_path / "two" / "rcm" / "checkpoints"
    deadline = time.monotonic() + 300
    while not (checkpoints.exists() and step_checkpoints.steps_in(checkpoints)):
        assert time.monotonic() < deadline and together[0].is_alive()
        time.sleep(0.05)
    for run in together:
        run.kill()
        run.join()
    assert not (tmp_path / "two" / "rcm" / "finished.json").exists()
    finish(tmp_path / "two", start(tmp_path / "two", inputs, "rcm", 2))
    train_alone(tmp_path / "one", inputs, "rcm")
    folders = (tmp_path / name / "rcm" for name in ("one", "two"))
    assert_alike(*folders, inputs / "base.safetensors")


def test_two_tune_sla_on_the_student_as_one_does(inputs, tmp_path):
    """What they write is made of three networks, each split in two."""
    finish(tmp_path / "two", start(tmp_path / "two", inputs, "sla", 2))
    train_alone(tmp_path / "one", inputs, "sla")
    folders = (tmp_path / name / "sla" for name in ("one", "two"))
    assert_alike(*folders, inputs / "base.safetensors")
