"""A stage that trains a tiny network on noise: `python dummy_training.py RUN STEPS [SAVE_EVERY]`.

It uses the frame of the real stages, has no ComfyUI, and takes little time, so that tests may kill
it at any moment. With torchrun the network is sharded.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent))
import pack  # noqa: F401
from turbodiffusion_pack.turbo_core.training import loop, run_folder
from turbodiffusion_pack.turbo_core.training.gradients import norm_or_nothing
from turbodiffusion_pack.turbo_core.training.processes import grouped, processes
from turbodiffusion_pack.turbo_core.training.report import Report
from turbodiffusion_pack.turbo_core.training.trained import Trained

COLUMNS = ["loss", "gradient_norm"]


class Dummy:
    """Network, optimizer and an average of the weights; step(n) depends on n alone."""

    def __init__(self, width: int = 8, bad_steps: range = range(0)):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4))
        if grouped():
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.network)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-2)
        self.average = {n: p.detach().clone() for n, p in self.network.named_parameters()}
        self.bad_steps = bad_steps

    @property
    def state(self) -> dict:
        return {"student": Trained(self.network, self.optimizer), "average": self.average}

    def step(self, n: int) -> dict[str, torch.Tensor]:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(n))
        x = x * float("nan") if n in self.bad_steps else x
        self.optimizer.zero_grad()
        loss = (self.network(x) - x).square().mean()
        loss.backward()
        norm = norm_or_nothing(self.network.parameters())
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                self.average[name].lerp_(parameter, 0.1)
        return {"loss": loss, "gradient_norm": norm}

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


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


if __name__ == "__main__":
    with processes("cpu"):
        train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Dummy())
