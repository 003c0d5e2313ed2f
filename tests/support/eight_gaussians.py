"""A world of two numbers on which rCM trains in seconds: eight Gaussians on a circle, two prompts.

The teacher is no network: the velocity of a mixture of Gaussians has a closed form. A prompt names
one half of the circle. Nothing here is shipped; what is trained with is turbo_core/training.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from turbodiffusion_pack.turbo_core.rcm import rcm_angles
from turbodiffusion_pack.turbo_core.training import losses
from turbodiffusion_pack.turbo_core.training.ema import PowerEMA
from turbodiffusion_pack.turbo_core.training.noise_levels import log_normal, shifted_uniform
from turbodiffusion_pack.turbo_core.training.samplers import (
    euler,
    falling,
    few_steps,
    guided,
    shifted_levels,
)
from turbodiffusion_pack.turbo_core.training.trigflow import (
    LARGEST_ANGLE,
    Velocity,
    angle_of,
    denoise,
    noised,
    predict,
)

RADIUS, STD = 1.4, 0.15  # so that each coordinate has variance 1
GUIDANCE = 1.5
BATCH = 256
SIGMA_MAX = 80.0
STEPS = (1, 2, 4)

_turns = torch.arange(8, dtype=torch.float64) * math.pi / 4 + math.pi / 8
CENTRES = RADIUS * torch.stack([_turns.cos(), _turns.sin()], dim=1)  # [8, 2]


def mixture_velocity(x: torch.Tensor, level: torch.Tensor, modes: torch.Tensor) -> torch.Tensor:
    """E[noise - x0 | x] [B, 2] of the Gaussians that `modes`, bool [B, 8], selects."""
    signal, s = 1 - level[:, None], level[:, None]
    variance = (signal * STD) ** 2 + s**2  # of x around a centre
    away = x[:, None] - signal[..., None] * CENTRES  # [B, 8, 2]
    likelihood = -away.square().sum(-1) / (2 * variance)
    share = likelihood.masked_fill(~modes, -math.inf).softmax(1)
    slope = (s - signal * STD**2) / variance
    return (share[..., None] * (slope[..., None] * away - CENTRES)).sum(1)


def teacher(prompt: torch.Tensor, guidance: float = GUIDANCE) -> Velocity:
    """The exact velocity for prompts [B] of 0 and 1, pushed away from that of no prompt."""
    half = torch.arange(8) // 4 == prompt[:, None]
    everything = torch.ones_like(half)
    return guided(
        lambda x, level: mixture_velocity(x, level, half),
        lambda x, level: mixture_velocity(x, level, everything),
        guidance,
    )


class Network(nn.Module):
    """(x, level, prompt) -> velocity; it computes in float32, as a real one does at best."""

    def __init__(self, width: int = 64):
        super().__init__()
        hidden = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.layers = nn.Sequential(nn.Linear(12, width), nn.SiLU(), *hidden, nn.Linear(width, 2))

    def forward(self, x, level, prompt):
        waves = level.float()[:, None] * math.pi * torch.tensor([1.0, 2.0, 4.0, 8.0])
        sign = 2 * prompt[:, None].float() - 1
        parts = [x.float(), level.float()[:, None], waves.sin(), waves.cos(), sign]
        return self.layers(torch.cat(parts, dim=1))

    def of(self, prompt: torch.Tensor) -> Velocity:
        return lambda x, level: self(x, level, prompt)


class World:
    """Random samples of everything that training draws, from one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def prompts(self, count: int = BATCH) -> torch.Tensor:
        return torch.randint(0, 2, (count,), generator=self.generator)

    def noise(self, count: int = BATCH) -> torch.Tensor:
        return torch.randn(count, 2, generator=self.generator, dtype=torch.float64)

    def data(self, prompt: torch.Tensor) -> torch.Tensor:
        mode = 4 * prompt + torch.randint(0, 4, prompt.shape, generator=self.generator)
        return CENTRES[mode] + STD * self.noise(len(prompt))

    def angles(self) -> torch.Tensor:
        return angle_of(log_normal(BATCH, 0.0, 1.6, self.generator))

    def shifted_angles(self) -> torch.Tensor:
        return angle_of(shifted_uniform(BATCH, 5.0, self.generator))

    def rollout(self, network: Network, prompt: torch.Tensor, steps: int) -> torch.Tensor:
        first = torch.full((BATCH,), LARGEST_ANGLE, dtype=torch.float64)
        angles = torch.stack([first, *(self.shifted_angles() for _ in range(steps - 1))])
        return few_steps(network.of(prompt), self.noise(), falling(angles), self.generator)


def pretrained(seed: int, iterations: int = 600) -> Network:
    """A network that knows the teacher's velocity without guidance: where a student starts."""
    torch.manual_seed(seed)
    world, network = World(seed), Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(iterations):
        prompt = world.prompts()
        level = log_normal(BATCH, 0.0, 1.6, world.generator)
        s = level[:, None]
        x = (1 - s) * world.data(prompt) + s * world.noise()
        target = teacher(prompt, guidance=1.0)(x, level)
        optimizer.zero_grad()
        losses.sla_regression(network(x, level, prompt), target).backward()
        optimizer.step()
    return network


@dataclass(frozen=True)
class Recipe:
    """How a student is trained; rCM's own settings, but for sizes that suit this world."""

    iterations: int = 1300
    warmup: int = 100  # iterations; by the consistency loss alone
    alone: int | None = None  # iterations without the DMD loss; None is all of them
    tangent: Callable = losses.consistency_difference
    normalise: Callable = losses.normalised
    share: Callable = losses.warmup_share
    guidance: float = GUIDANCE
    critic_steps: int = 5  # iterations from one student update to the next, with the DMD loss
    dmd_scale: float = 1.0
    learning_rate: float = 6e-3


def distilled(start: Network, recipe: Recipe, seed: int) -> Network:
    """The average of a student that was trained by `recipe` from the weights of `start`."""
    world = World(seed)
    student, fake, average = (copy_of(start) for _ in range(3))
    ema = PowerEMA(list(student.parameters()), length=0.05)
    optimizers = [adam(student, recipe.learning_rate), adam(fake, recipe.learning_rate / 2)]
    alone = recipe.iterations if recipe.alone is None else recipe.alone
    updates = 0
    for iteration in range(recipe.iterations):
        prompt, rollout_steps = world.prompts(), 1 + updates % 4
        set_rate(optimizers[0], recipe.learning_rate, iteration / recipe.iterations)
        if iteration > alone and (iteration - alone) % recipe.critic_steps:
            with torch.no_grad():
                x0 = world.rollout(student, prompt, rollout_steps)
            angle, noise = world.shifted_angles(), world.noise()
            answer = predict(fake.of(prompt), noised(x0, noise, angle), angle)
            step(optimizers[1], losses.fake_score_loss(answer, x0, noise, angle))
            continue
        loss = consistency(world, student, prompt, recipe, iteration)
        if iteration >= alone:
            x0 = world.rollout(student, prompt, rollout_steps)
            loss = loss + recipe.dmd_scale * dmd(world, fake, prompt, x0)
        step(optimizers[0], loss)
        ema.update(list(student.parameters()), updates, torch.tensor(True))
        updates += 1
    for weight, mean in zip(average.parameters(), ema.tensors, strict=True):
        weight.data.copy_(mean)
    return average


def consistency(world: World, student: Network, prompt, recipe: Recipe, iteration: int):
    """rCM's consistency loss on a batch of data."""
    angle = world.angles()
    x = noised(world.data(prompt), world.noise(), angle)
    target = predict(teacher(prompt, recipe.guidance), x, angle)
    tangent = recipe.tangent(student.of(prompt), x, angle, target)
    answer = predict(student.of(prompt), x, angle)
    share = recipe.share(iteration, recipe.warmup)
    gradient = losses.consistency_gradient(answer.detach(), target, x, tangent, angle, share)
    return losses.consistency_loss(answer, recipe.normalise(gradient))


def dmd(world: World, fake: Network, prompt: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """rCM's regulariser on the student's samples x0."""
    angle = world.shifted_angles()
    x = noised(x0.detach(), world.noise(), angle)
    with torch.no_grad():
        by_fake = denoise(x, predict(fake.of(prompt), x, angle), angle)
        by_teacher = denoise(x, predict(teacher(prompt), x, angle), angle)
    return losses.dmd_loss(x0, losses.dmd_gradient(x0, by_fake, by_teacher))


def copy_of(network: Network) -> Network:
    other = Network()
    other.load_state_dict(network.state_dict())
    return other


def adam(network: Network, rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.0, 0.99))


def set_rate(optimizer: torch.optim.Optimizer, rate: float, progress: float) -> None:
    """Up in the first tenth, down to zero in the second half."""
    optimizer.param_groups[0]["lr"] = rate * min(1, 10 * progress, 2 - 2 * progress)


def step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Reference:
    """Samples of the teacher, and how far from them those of Euler's method in few steps are."""

    def __init__(self, count: int = 4096):
        world = World(77)
        self.prompt = torch.arange(count) % 2
        self.noise = world.noise(count)
        levels = shifted_levels(100, 3.0, SIGMA_MAX)
        self.samples = euler(teacher(self.prompt), world.noise(count), levels)
        self.floor = self.distance(euler(teacher(self.prompt), self.noise, levels))
        self.euler = {steps: self._euler(steps) for steps in STEPS}

    def _euler(self, steps: int) -> float:
        """At the best of three shifts."""
        levels = (shifted_levels(steps, shift, SIGMA_MAX) for shift in (1.0, 3.0, 5.0))
        return min(self.distance(euler(teacher(self.prompt), self.noise, s)) for s in levels)

    @torch.no_grad()
    def times_closer(self, student: Network) -> dict[int, float]:
        """How many times closer than Euler's the student's samples are, by steps."""
        closer = {}
        for steps in STEPS:
            angles = torch.tensor(rcm_angles(steps, SIGMA_MAX)[:-1])
            generator = torch.Generator().manual_seed(steps)
            samples = few_steps(student.of(self.prompt), self.noise, angles, generator)
            closer[steps] = self.euler[steps] / self.distance(samples)
        return closer

    def distance(self, samples: torch.Tensor) -> float:
        """Sliced Wasserstein distance to the teacher's samples, the mean of the two prompts'."""
        both = zip(self._sorted(samples), self._sorted(self.samples), strict=True)
        return sum((a - b).abs().mean().item() for a, b in both) / 2

    def _sorted(self, samples: torch.Tensor) -> list[torch.Tensor]:
        turns = torch.arange(64, dtype=torch.float64) * math.pi / 64
        directions = torch.stack([turns.cos(), turns.sin()])  # [2, 64]
        return [(samples[self.prompt == p] @ directions).sort(0).values for p in (0, 1)]
