"""A stage that trains a tiny network on noise.

    torchrun dummy_training.py RUN STEPS SAVE_EVERY BAD

It uses the frame of the real stages, has no ComfyUI, and takes little time, so that tests may kill
it at any moment. With torchrun the network is sharded, and in the last process alone the batch of
step number BAD is not finite.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Container
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent))
import fresh_process
import pack  # noqa: F401
from turbodiffusion_pack.turbo_core.training import loop, run_folder
from turbodiffusion_pack.turbo_core.training.error import TrainingError
from turbodiffusion_pack.turbo_core.training.learner import Learner
from turbodiffusion_pack.turbo_core.training.processes import count, grouped, processes, rank
from turbodiffusion_pack.turbo_core.training.report import Report

COLUMNS = ["loss", "gradient_norm"]


class Dummy:
    """A network that learns; step(n) depends on n alone."""

    def __init__(self, width: int = 8, bad_steps: Container[int] = ()):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4))
        if grouped():
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.network, mesh=init_device_mesh("cpu", (count(),)))
        self.learner = Learner(self.network, (0.9, 0.999), weight_decay=0.01, ema_length=0.1)
        self.bad_steps = bad_steps

    @property
    def average(self) -> dict[str, torch.Tensor]:
        return self.learner.average()

    @property
    def state(self) -> dict:
        return self.learner.state("student")

    def step(self, n: int) -> dict[str, torch.Tensor]:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(n))
        x = x * float("nan") if n in self.bad_steps and rank() == count() - 1 else x
        loss = (self.network(x) - x).square().mean()
        loss.backward()
        return {"loss": loss, "gradient_norm": self.learner.update(1e-2, n)}

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: _whole(tensor.detach()) for name, tensor in self.average.items()}


def train(root: Path, steps: int, save_every: int, dummy: Dummy, stage: str = "dummy") -> None:
    """The whole stage, as real ones are."""
    settings = {"steps": steps, "optimizer": {"lr": 1e-2}}
    with run_folder.open(root, stage, settings) as folder:
        if folder.finished:
            return
        report = Report(folder.path, COLUMNS, steps, every=3)
        loop.train(folder, report, dummy.state, dummy.step, save_every)
        weights = dummy.weights()
        folder.finish(lambda path: torch.save(weights, path / "weights.pt"))


def train_dummy(root: str, steps: int, save_every: int) -> None:
    """train, as a process's target."""
    train(Path(root), steps, save_every, Dummy())


def die_at(event: int, root: str) -> None:
    """Train, and be killed just before the `event`-th change of what is on the disk."""
    seen = [0]

    def counted(change):
        def changed(*args, **kwargs):
            seen[0] += 1
            if seen[0] == event:
                os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
            return change(*args, **kwargs)

        return changed

    for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    train(Path(root), 3, 1, Dummy())


def train_with_little_room(root: str, told: str) -> None:
    """Train where no file may grow beyond 20 kB, as a full disk refuses to let it."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        train(Path(root), 20, 5, Dummy(width=4000))
    except TrainingError as error:
        Path(told).write_text(str(error))


def finish_without_room(place: int, port: int, root: str) -> None:
    """Be the process number `place` of two, of which the first finds the disk full at the end."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {**address, "RANK": str(place), "LOCAL_RANK": str(place)}
    os.environ["TORCHELASTIC_RUN_ID"] = "test"

    def write(path: Path) -> None:
        if rank() == 0:
            raise OSError(28, "No space left on device")

    with processes("cpu"), run_folder.open(Path(root), "dummy", {}) as folder:
        try:
            folder.finish(write)
        except TrainingError as error:
            Path(root, f"told-{place}").write_text(f"{error.everywhere}: {error}")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def started(target: Callable, *arguments: object) -> multiprocessing.Process:
    """A process that does target(*arguments), which a test may kill; started within moments."""
    process = fresh_process.context().Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


if __name__ == "__main__":
    with processes("cpu"):
        steps, save_every, bad = map(int, sys.argv[2:])
        train(Path(sys.argv[1]), steps, save_every, Dummy(bad_steps=[bad]))
