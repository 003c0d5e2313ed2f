"""The toy world's VAE: trained on clips as they are rendered, then scaled for Wan's latents.

The network comes in from the host's side: `wan` in it is ComfyUI's own module, `encode` and
`decode` take whole clips (host/wan_vae.py).
"""

import torch
from torch.func import functional_call

from ..batches import Draws
from ..learner import Learner, cosine
from ..presets import VAE
from ..recorded import Backward
from ..slots import Values
from .reader import read
from .world import WORDS, Clips, draw, render, track

COLUMNS = ("loss", "l1", "mse", "kl", "gradient_norm", "lr")
HELD_OUT = 10**9  # samples from here on are for measuring; no training sees them


class VAETraining:
    """Step by step; the network learns in place, in bf16 on a GPU with fp32 weights.

    Args:
        network: a TrainableVAE on the device that trains.
        settings: the recipe.
        video: frames, and pixels of a frame's edge.
        seed: of the world.
        recorded: whether a pass is replayed as a CUDA graph.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        settings: VAE,
        video: tuple[int, int],
        seed: int,
        recorded: bool = False,
    ):
        self.network, self.settings, self.video, self.seed = network, settings, video, seed
        self.learner = Learner(network, settings.betas, settings.weight_decay)
        self.device = self.learner.weights[0].device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        # One for crops, one for whole frames: what is recorded keeps its shapes.
        self.learn = [Backward(self._loss, self.learner.weights, recorded) for _ in range(2)]

    def step(self, n: int) -> dict[str, torch.Tensor | float]:
        """Update number n, from 0."""
        settings, draws = self.settings, Draws(self.seed, n, 0, self.device)
        clips = self._clips(n, draws)
        count, _, frames, height, width = clips.shape
        latent = count, 16, (frames + 3) // 4, height // 8, width // 8
        noise = draws.normal("latents", clips.new_empty(latent, dtype=self.dtype))
        values = self.learn[self._whole(n)](1.0, clips, noise)
        lr = cosine(settings.lr, n, settings.warmup, settings.steps)
        return {**values, "gradient_norm": self.learner.update(lr, n), "lr": lr}

    def _loss(self, clips: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, Values]:
        settings = self.settings
        weights = {name: p.to(self.dtype) for name, p in self.network.named_parameters()}
        seen, mean, log_variance = functional_call(
            self.network, weights, (clips.to(self.dtype), noise)
        )
        error = seen.float() - clips
        l1, mse = error.abs().mean(), error.square().mean()
        kl = divergence(mean.float(), log_variance.float()).mean()
        loss = l1 + settings.mse_weight * mse + settings.kl_weight * kl
        parts = {"loss": loss, "l1": l1, "mse": mse, "kl": kl}
        return loss, {name: part.detach() for name, part in parts.items()}

    def _whole(self, n: int) -> bool:
        """Whether the update learns whole frames."""
        return n >= self.settings.steps * (1 - self.settings.whole)

    def _clips(self, n: int, draws: Draws) -> torch.Tensor:
        """Crops around the shape; towards the end whole frames, as the VAE will be used."""
        settings, (frames, pixels) = self.settings, self.video
        whole = self._whole(n)
        share = (settings.crop / pixels) ** 2 if whole else 1.0
        clips = draw(self.seed, n * settings.batch, max(1, round(share * settings.batch)))
        clips = clips.to(self.device)
        if whole:
            return pictures(render(clips, frames, pixels))
        corner = around(clips, frames, settings.crop / pixels, draws.generator("crop"))
        return pictures(render(clips, frames, pixels, corner, settings.crop))

    def state(self) -> dict:
        """What a checkpoint holds."""
        return self.learner.state("vae")

    @torch.no_grad()
    def sample(self) -> torch.Tensor:
        """Four clips that no step saw, each beside what becomes of it."""
        clips = render(draw(self.seed, HELD_OUT, 4).to(self.device), *self.video)
        seen = frames_of(self.network.decode(self.network.encode(pictures(clips))[0]))
        return torch.stack([clips, seen], dim=1).flatten(0, 1)


def divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL divergence of each N(mean, variance) from N(0, 1) (arXiv 1312.6114, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def around(clips: Clips, frames: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Corners [B, 2] of crops, `share` of the frame wide, that show the shape in some frame."""
    centre, _ = track(clips, frames)  # [B, T, 2]
    count = len(centre)
    device = centre.device
    when = torch.randint(frames, (count,), generator=generator, device=device)
    place = torch.rand(count, 2, generator=generator, device=device)
    corner = centre[torch.arange(count, device=device), when] - share * place
    return corner.clamp(0, 1 - share)


@torch.no_grad()
def latent_spread(
    network: torch.nn.Module, batches: list[Clips], video: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation of the channels of the clips' latents, float64 [16] each, on the CPU."""
    latents = [network.encode(pictures(render(clips, *video)))[0].double() for clips in batches]
    channels = torch.cat([x.movedim(1, 0).flatten(1) for x in latents], dim=1)
    return channels.mean(1).cpu(), channels.std(1).cpu()


@torch.no_grad()
def fold(
    wan: torch.nn.Module,
    found: tuple[torch.Tensor, torch.Tensor],
    wanted: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Make latents of the mean and deviation `found` come out as `wanted`, and decode as before.

    Both go into the two convolutions of one pixel at the latents' side, so they are exact: the last
    of the encoder, whose first half of channels is the mean and second the log variance, and the
    first of the decoder.

    Args:
        wan: ComfyUI's WanVAE, in place.
        found: mean and deviation, [16] each, as latent_spread measured them.
        wanted: those that ComfyUI takes Wan's latents to have.
    """
    mean, deviation, to_mean, to_deviation = (x.double() for x in (*found, *wanted))
    scale = to_deviation / deviation
    last, first = wan.conv1, wan.conv2
    scales = torch.cat([scale, torch.ones_like(scale)])
    shifts = torch.cat([to_mean - scale * mean, 2 * scale.log()])
    _set(last.weight, scales.view(-1, 1, 1, 1, 1) * _double(last.weight))
    _set(last.bias, scales * _double(last.bias) + shifts)
    weight = _double(first.weight)
    _set(first.bias, _double(first.bias) + weight[..., 0, 0, 0] @ (mean - to_mean / scale))
    _set(first.weight, weight / scale.view(1, -1, 1, 1, 1))


@torch.no_grad()
def measured(network: torch.nn.Module, batches: list[Clips], video: tuple[int, int]) -> dict:
    """How well clips come through: PSNR in dB, and how many the reader still reads right.

    The PSNR is the mean over clips, values in [0, 1]; "psnr_noisy" has noise of 0.1 times the
    latents' deviation in them, about what a model leaves.
    """
    plain, noisy, right = [], [], []
    dtype = next(network.parameters()).dtype
    for clips in batches:
        videos = render(clips, *video)
        latents = network.encode(pictures(videos).to(dtype))[0]
        spread = latents.float().std(dim=(0, 2, 3, 4), keepdim=True).to(dtype)
        seen = frames_of(network.decode(latents))
        plain.append(psnr(seen, videos))
        noise = 0.1 * spread * torch.randn_like(latents)
        noisy.append(psnr(frames_of(network.decode(latents + noise)), videos))
        reading = read(seen)
        right.append(torch.stack([getattr(reading, n) == getattr(clips, n) for n in WORDS]))
    shares = torch.cat(right, dim=1).float().mean(1).tolist()
    return {
        "psnr": round(float(torch.cat(plain).mean()), 2),
        "psnr_noisy": round(float(torch.cat(noisy).mean()), 2),
        "read_right": {name: round(share, 4) for name, share in zip(WORDS, shares, strict=True)},
    }


def psnr(seen: torch.Tensor, videos: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio [B] in dB of videos in [0, 1]."""
    error = (seen.float() - videos.float()).square().flatten(1).mean(1)
    return -10 * error.clamp(min=1e-10).log10()


def pictures(videos: torch.Tensor) -> torch.Tensor:
    """[B, T, H, W, 3] in [0, 1] as the VAE's [B, 3, T, H, W] in [-1, 1].

    Channels stay last in memory, where convolutions of so few are fastest.
    """
    return videos.movedim(-1, 1) * 2 - 1


def frames_of(decoded: torch.Tensor) -> torch.Tensor:
    """The VAE's [B, 3, T, H, W] as videos [B, T, H, W, 3] in [0, 1], float32."""
    return ((decoded.float() + 1) / 2).clamp(0, 1).movedim(1, -1)


def _double(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.double().cpu()


def _set(parameter: torch.Tensor, value: torch.Tensor) -> None:
    parameter.copy_(value.to(parameter))
