"""ComfyUI's own Wan VAE as a network to train: whole clips at once, with gradients."""

from pathlib import Path

import comfy.latent_formats
import torch
import torch.nn.functional as F  # noqa: N812
from comfy.ldm.wan.vae import (
    AttentionBlock,
    CausalConv3d,
    Resample,
    ResidualBlock,
    RMS_norm,
    WanVAE,
)
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..training.error import TrainingError
from ..training.toy.vae import frames_of

# What ComfyUI's VAELoader builds around a file of the Wan 2.1 VAE's names; it reads dim from it.
CONFIG = {
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}
LEAST_LENGTH = 1e-12  # that is divided by, as in the host's norm
FIRST_LOG_VARIANCE = -6.0  # from 0 on, latents would be noise and the decoder learn without them


class TrainableVAE(torch.nn.Module):
    """A Wan VAE of `dim` channels with freshly drawn weights; `wan` has them under Wan's names.

    ComfyUI encodes and decodes a clip in pieces and carries the convolutions' last frames over.
    All of it is causal, so a whole clip at once gives the same numbers, in a fraction of the calls.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.wan = WanVAE(dim=dim, **CONFIG)
        _first_weights(self.wan)

    def forward(
        self, video: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The video through latents that N(0, 1) `noise` draws, and what `encode` gives."""
        mean, log_variance = self.encode(video)
        return self.decode(mean + noise * (log_variance / 2).exp()), mean, log_variance

    def encode(self, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logarithm of the variance, each [B, 16, (T + 3) / 4, H / 8, W / 8].

        Args:
            video: [B, 3, T, H, W] in [-1, 1]; T is a multiple of 4 and one more.
        """
        encoder = self.wan.encoder
        x = encoder.conv1(video)
        for layer in (*encoder.downsamples, *encoder.middle):
            x = _fewer_frames(layer, _through(layer, x))
        x = _normed_convolution(encoder.head[0], encoder.head[2], x)
        mean, log_variance = self.wan.conv1(x).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents, as `encode` gives their mean, as a video [B, 3, T, H, W], about in [-1, 1]."""
        decoder = self.wan.decoder
        x = decoder.conv1(self.wan.conv2(latents))
        for layer in (*decoder.middle, *decoder.upsamples):
            x = _through(layer, _more_frames(layer, x))
        return _normed_convolution(decoder.head[0], decoder.head[2], x)


class LatentVAE:
    """A VAE file at work: to and from latents as Wan's network knows them, about N(0, 1).

    It computes in bf16 on a GPU, as ComfyUI does, and in fp32 on the CPU.

    Raises:
        TrainingError: the file cannot be read, or is no Wan 2.1 VAE.
    """

    def __init__(self, path: Path, device: torch.device):
        try:
            tensors = load_file(path)
            self.network = TrainableVAE(tensors["decoder.head.0.gamma"].shape[0])
            self.network.wan.load_state_dict(tensors)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise TrainingError(
                f"{path} is no Wan 2.1 VAE ({str(error).splitlines()[0]}): run the vae stage, or "
                "name such a file"
            ) from error
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.network.requires_grad_(False).to(device, self.dtype)
        shape = (1, -1, 1, 1, 1)
        self.mean, self.deviation = (x.view(shape).to(device) for x in latent_statistics())

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Video [B, 3, T, H, W] in [-1, 1] to latents [B, 16, T', H', W'], float32."""
        raw = self.network.encode(video.to(self.dtype))[0]
        return (raw.float() - self.mean) / self.deviation

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, 16, T', H', W'] to a video [B, 3, T, H, W], about in [-1, 1], float32."""
        raw = latents.float() * self.deviation + self.mean
        return self.network.decode(raw.to(self.dtype)).float()

    @torch.no_grad()
    def videos(self, latents: torch.Tensor, at_once: int = 32) -> torch.Tensor:
        """Latents [B, 16, T', H', W'] as videos [B, T, H, W, 3], float32 in [0, 1]."""
        return torch.cat([frames_of(self.decode(some)) for some in latents.split(at_once)])


def latent_statistics() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, float32 [16] each, that ComfyUI takes Wan 2.1's latents to have.

    What the model sees is (latents - mean) / deviation.
    """
    wan = comfy.latent_formats.Wan21()
    return wan.latents_mean.flatten(), wan.latents_std.flatten()


@torch.no_grad()
def _first_weights(wan: WanVAE) -> None:
    """Weights that keep the variance, blocks that do nothing yet, latents almost without noise.

    With torch's own first weights the biases of so many layers drown the picture.
    """
    for module in wan.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            module.weight.normal_(0, module.weight[0].numel() ** -0.5)
            module.bias.zero_()
    for module in wan.modules():
        if isinstance(module, ResidualBlock):
            module.residual[-1].weight.zero_()
        elif isinstance(module, AttentionBlock):
            module.proj.weight.zero_()
    log_variance = slice(CONFIG["z_dim"], None)
    wan.conv1.weight[log_variance] = 0
    wan.conv1.bias[log_variance] = FIRST_LOG_VARIANCE


def _through(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer's answer to x [B, C, T, H, W]; a residual block's in fewer kernels than its own."""
    if not isinstance(layer, ResidualBlock):
        return layer(x)
    norm, _, convolution, other_norm, _, _, other = layer.residual
    y = _normed_convolution(norm, convolution, x)
    return _normed_convolution(other_norm, other, y) + layer.shortcut(x)


def _normed_convolution(norm: RMS_norm, convolution: CausalConv3d, x: torch.Tensor) -> torch.Tensor:
    """RMS norm, SiLU and a causal convolution of 3 x 3 x 3 of x [B, C, T, H, W].

    The host's layers would go over memory twice as often.
    """
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp(min=LEAST_LENGTH)
    active = F.silu(x / length * (norm.scale * norm.gamma).to(x))
    frames = F.pad(active, (0, 0, 0, 0, 2, 0))
    return F.conv3d(frames, convolution.weight, convolution.bias, padding=(0, 1, 1))


def _fewer_frames(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """After a layer that halves the frames: the first stays, each next pair becomes one."""
    if not isinstance(layer, Resample) or layer.mode != "downsample3d" or x.shape[2] == 1:
        return x
    return torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)


def _more_frames(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Before a layer that doubles the frames: the first stays, each other becomes two.

    The convolution over time does not see the first frame. Channels are last in memory from here
    on: of frames taken apart any other way they would not be, and all that follows be slower.
    """
    if not isinstance(layer, Resample) or layer.mode != "upsample3d" or x.shape[2] == 1:
        return x
    pairs = layer.time_conv(x[:, :, 1:]).movedim(1, -1).unflatten(-1, (2, -1))
    pairs = pairs.movedim(4, 2).flatten(1, 2)  # [B, T, H, W, 2, C] to [B, 2 T, H, W, C]
    return torch.cat([x[:, :, :1].movedim(1, -1), pairs], dim=1).movedim(-1, 1)
