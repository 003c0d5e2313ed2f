"""The host's Wan 2.1 VAE run by our own functions over its modules, frames with channels last.

The decoder takes one latent frame after the other, the encoder the first frame and then four by
four; every convolution over time carries its last frames over to the next piece. The middle of the
network, with its attention, sees whole frames; the larger levels may see strips of them.
"""

from collections.abc import Iterable, Iterator

import comfy.ops
import torch
from comfy.ldm.wan.vae import Resample, ResidualBlock
from torch import Tensor
from torch.nn import functional

from ...kernels.causal_frames import causal_frames, frames_apart, resample_frames
from ...kernels.frames_conv import frames_conv, left_to_cudnn, packed
from ..vae_strips import Level, Strip, halos
from .weights import fetched, kept

AT_ONCE = 2  # latent frames that the middle of the network runs together
SCORES = 2**26  # of its attention at a time, 256 MB of float32


class Frames:
    """What a convolution gave, y [B, T, H, W, C], and what is still to be added to it."""

    __slots__ = ("bias", "residual", "y")

    def __init__(self, y: Tensor, bias: Tensor | None = None, residual: Tensor | None = None):
        self.y, self.bias, self.residual = y, bias, residual

    def take(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All of it, for the last time: whoever else holds the frames holds no memory then."""
        taken = self.y, self.bias, self.residual
        self.y = self.bias = self.residual = None
        return taken

    def finished(self) -> Tensor:
        """y + bias + residual, for the last time."""
        return resample_frames(*self.take())

    def narrow(self, axis: int, first: int, last: int) -> None:
        self.y = self.y.narrow(axis, first, last - first)
        if self.residual is not None:
            self.residual = self.residual.narrow(axis, first, last - first)


class Layers:
    """The VAE's layers on piece after piece of one video, or of one strip of it."""

    def __init__(self):
        self.caches = {}  # of a convolution over time: the frames before, [B, P, H, W, C]
        self.packed = {}  # a convolution's weight and bias as our own kernel reads them

    def cache_of(self, conv, y: Tensor) -> Tensor:
        if conv not in self.caches:
            before = conv.kernel_size[0] - conv.stride[0]
            shape = y.shape[0], before, *y.shape[2:]
            self.caches[conv] = torch.zeros(shape, dtype=y.dtype, device=y.device)
        return self.caches[conv]

    def frames_for(self, conv, x: Frames, norm=None, keep: bool = False, apart: bool = False):
        """What `conv` reads, and x its end, unless `keep`, which leaves it finished."""
        y, run = x.y, frames_apart if apart else causal_frames
        gamma = None if norm is None else norm.gamma.to(y).flatten()
        out = run(y, self.cache_of(conv, y), gamma, x.bias, x.residual, keep)
        x.take()
        if keep:
            x.y = y
        return out

    def causal(
        self, conv, x: Frames, norm=None, keep: bool = False, residual: Tensor | None = None
    ) -> Frames:
        """conv(norm(x)) of x and the frames before; the end of x, unless `keep`, see above."""
        if left_to_cudnn(x.y, conv.out_channels):
            y = convolve(conv, self.frames_for(conv, x, norm, keep))
            y.residual = residual
            return y
        parts = self.frames_for(conv, x, norm, keep, apart=True)
        self.caches[conv] = parts[2]
        return self.convolve(conv, parts, residual)

    def pictures(self, conv, x: Tensor) -> Frames:
        """A convolution of each of the frames [B, T, H, W, C]."""
        if left_to_cudnn(x, conv.out_channels):
            return convolve_pictures(conv, x, 1)
        return self.convolve(conv, x)

    def convolve(self, conv, x: Tensor | tuple, residual: Tensor | None = None) -> Frames:
        """By our own kernel, which adds the bias and the residual."""
        if conv not in self.packed:
            like = x[0] if isinstance(x, tuple) else x
            with fetched(conv, like.dtype, like.device) as (weight, bias):
                self.packed[conv] = packed(weight), None if bias is None else bias.clone()
        return Frames(frames_conv(x, *self.packed[conv], residual))

    def block(self, block: ResidualBlock, x: Frames) -> Frames:
        norm1, _, conv1, norm2, _, _, conv2 = block.residual
        h = self.causal(conv1, x, norm1, keep=True)
        residual, *_ = x.take()
        if block.in_dim != block.out_dim:
            residual = convolve(block.shortcut, residual).finished()
        return self.causal(conv2, h, norm2, residual=residual)

    def blocks(self, blocks: Iterable[ResidualBlock], x: Frames) -> Frames:
        for block in blocks:
            x = self.block(block, x)
        return x

    def middle(self, middle, x: Frames) -> Frames:
        before, attention, after = middle
        x = attend(attention, self.block(before, x).finished())
        return self.block(after, Frames(x))

    def larger(self, layer: Resample, x: Frames, first: bool) -> Frames:
        """Twice as high and wide; but for the first piece twice as many frames where it does so."""
        split = 1
        if layer.mode == "upsample3d" and not first:
            split, x = 2, self.causal(layer.time_conv, x)
        return self.pictures(layer.resample[1], resample_frames(*x.take(), split, scale=2))

    def smaller(self, layer: Resample, x: Frames, first: bool) -> Frames:
        """Half as high and wide; but for the first piece half as many frames where it does so."""
        x = convolve_pictures(layer.resample[1], resample_frames(*x.take(), corner=1), 0)
        if layer.mode == "downsample2d":
            return x
        frames = self.frames_for(layer.time_conv, x)
        return Frames(frames[:, 1:]) if first else convolve(layer.time_conv, frames)

    def head(self, head, x: Frames) -> Tensor:
        norm, _, conv = head
        return self.causal(conv, x, norm).finished()


def attend(attention, x: Tensor) -> Tensor:
    """The host's attention block within each of the frames [B, T, H, W, C]."""
    pictures = x.flatten(0, 1).permute(0, 3, 1, 2)
    q, k, v = attention.to_qkv(attention.norm(pictures)).chunk(3, dim=1)
    in_16_bits = x.is_cuda and x.dtype != torch.float32
    run = attention_by_products if in_16_bits else attention.optimized_attention
    pictures = pictures + attention.proj(run(q, k, v))
    return pictures.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])


def attention_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over the pixels of pictures [N, C, H, W], some rows at a time.

    Of one head with 384 channels torch's fused kernels know a slow one only.
    """
    size = q.shape[2:]
    q, k, v = (x.flatten(2).transpose(1, 2) for x in (q, k, v))  # [N, H W, C]
    rows = max(128, SCORES // (k.shape[0] * k.shape[1]) // 128 * 128)
    exact = {} if q.dtype == torch.float32 else {"out_dtype": torch.float32}
    parts = []
    for part in q.split(rows, dim=1):
        scores = torch.bmm(part, k.transpose(1, 2), **exact).mul_(k.shape[-1] ** -0.5)
        parts.append(torch.bmm(scores.softmax(dim=-1).to(v.dtype), v))
    return torch.cat(parts, dim=1).transpose(1, 2).unflatten(2, size)


def convolve(conv, x: Tensor) -> Frames:
    """A convolution of frames [B, T, H, W, C] that already have those before them."""
    sides = tuple(size // 2 for size in conv.kernel_size[1:])
    y, bias = _convolve(conv, x.permute(0, 4, 1, 2, 3), functional.conv3d, (0, *sides))
    return Frames(y.permute(0, 2, 3, 4, 1).contiguous(), bias)


def convolve_pictures(conv, x: Tensor, side: int) -> Frames:
    """A convolution of each frame of [B, T, H, W, C], with `side` zeros around it."""
    pictures = x.flatten(0, 1).permute(0, 3, 1, 2)
    y, bias = _convolve(conv, pictures, functional.conv2d, (side, side))
    return Frames(y.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2]), bias)


def _convolve(conv, x: Tensor, convolution, padding: tuple) -> tuple[Tensor, Tensor | None]:
    """The convolution, and its bias if that is still to be added."""
    with fetched(conv, x.dtype, x.device) as (weight, bias):
        if not x.is_cuda:  # adds the bias before it rounds
            return convolution(x, weight, bias, conv.stride, padding), None
        if comfy.ops.NVIDIA_MEMORY_CONV_BUG_WORKAROUND and x.dtype != torch.float32:
            options = conv.dilation, conv.groups, False, False, True
            y = torch.cudnn_convolution(x, weight, padding, conv.stride, *options)
        else:
            y = convolution(x, weight, None, conv.stride, padding)
        return y, None if bias is None else kept(bias, conv.bias)


def levels_of(layers) -> list[tuple[list[ResidualBlock], Resample | None]]:
    """The layers of a decoder or an encoder, each level with the layer that ends it."""
    levels = [[]]
    for layer in layers:
        levels[-1].append(layer)
        if isinstance(layer, Resample):
            levels.append([])
    return [(level[:-1], level[-1]) for level in levels[:-1]] + [(levels[-1], None)]


def decode_features(model, z: Tensor) -> Tensor:
    """Latents [B, Z, T, H, W] as what strips are decoded from, [B, T, H, W, C]."""
    decoder, layers = model.decoder, Layers()
    blocks, _ = levels_of(decoder.upsamples)[0]
    pieces = []
    for piece in model.conv2(z).movedim(1, -1).split(AT_ONCE, dim=1):
        x = layers.causal(decoder.conv1, Frames(piece.contiguous()))
        x = layers.blocks(blocks, layers.middle(decoder.middle, x))
        pieces.append(x.finished())
    return torch.cat(pieces, dim=1)


def decode_pieces(model, features: Tensor, strip: Strip | None) -> Iterator[Tensor]:
    """Frames [B, 1 or 4, H, W, 3] about in [-1, 1] of a strip, for each of the latents' frames."""
    decoder, layers = model.decoder, Layers()
    levels = levels_of(decoder.upsamples)
    measures = decoder_levels(model)[1:]
    for t in range(features.shape[1]):
        x = Frames(features[:, t : t + 1])
        cut = Cut(strip, measures, x)
        for (_, resample), (blocks, _), measure in zip(levels, levels[1:], measures, strict=False):
            x = layers.larger(resample, x, first=t == 0)
            x = layers.blocks(blocks, x)
            if measure is not measures[-1]:
                cut.to_next(x, measure.scale)
        x = Frames(layers.head(decoder.head, x))
        cut.to_next(x, measures[-1].scale)
        yield x.y


def encode_pieces(model, pieces: Iterable[Tensor], strip: Strip | None) -> Iterator[Tensor]:
    """What a strip becomes on its way to the latents' size, [B, 1, H, W, C] for each piece.

    Args:
        pieces: [B, 1, H, W, 3] in [-1, 1], then [B, 4, H, W, 3], of the strip and its halo.
    """
    encoder, layers = model.encoder, Layers()
    levels = levels_of(encoder.downsamples)[:-1]
    measures = encoder_levels(model)[:-1]
    for t, piece in enumerate(pieces):
        x = layers.causal(encoder.conv1, Frames(piece))
        cut = Cut(strip, measures)
        for (blocks, resample), measure in zip(levels, measures, strict=True):
            x = layers.blocks(blocks, x)
            x = layers.smaller(resample, x, first=t == 0)
            cut.to_next(x, measure.scale // 2)
        yield x.finished()


def encode_latents(model, features: Tensor) -> Tensor:
    """The mean [B, Z, T, H, W] of the latents, from what `encode_pieces` gave for all frames."""
    encoder, layers = model.encoder, Layers()
    blocks, _ = levels_of(encoder.downsamples)[-1]
    pieces = []
    for piece in features.split(AT_ONCE, dim=1):
        x = layers.middle(encoder.middle, layers.blocks(blocks, Frames(piece.contiguous())))
        pieces.append(layers.head(encoder.head, x))
    both = torch.cat(pieces, dim=1).movedim(-1, 1)
    return model.conv1(both).chunk(2, dim=1)[0]


class Cut:
    """Takes from a strip, level by level, what the levels still to come do not look at."""

    def __init__(self, strip: Strip | None, levels: list[Level], x: Frames | None = None):
        """With `x`, whole frames of latents are cut to what the first level needs."""
        self.strip = strip
        self.halos = iter(halos(levels))
        if strip:
            self.now = strip.wider(next(self.halos))
        if strip and x:
            x.narrow(strip.axis, *self.now)

    def to_next(self, x: Frames, scale: int) -> None:
        """Cut x, which has `scale` pixels for one of the latents, to what the next level needs."""
        if not self.strip:
            return
        before, self.now = self.now, self.strip.wider(next(self.halos))
        x.narrow(self.strip.axis, *(scale * (edge - before[0]) for edge in self.now))


def decoder_levels(model) -> list[Level]:
    """Of the decoder, from the latents' size up. The first runs whole frames."""
    decoder, levels, frames = model.decoder, [], 1
    channels = decoder.conv1.in_channels, *_block_channels(decoder.middle[::2])
    resampled, reach = 0, 0
    for k, (blocks, resample) in enumerate(levels_of(decoder.upsamples)):
        channels = (*channels, *_block_channels(blocks))
        last = () if resample else (decoder.head[-1].in_channels,)
        levels.append(
            Level(2**k, frames, channels + last, resampled, reach + 2 * len(blocks) + len(last))
        )
        if resample:
            frames *= 2 if resample.mode == "upsample3d" else 1
            channels, resampled, reach = (), resample.dim, 1
    return levels


def encoder_levels(model) -> list[Level]:
    """Of the encoder, from the pixels' size down. The last runs whole frames."""
    encoder, levels, frames = model.encoder, [], 4
    channels, reach = (encoder.conv1.in_channels,), 1
    structure = levels_of(encoder.downsamples)
    for k, (blocks, resample) in enumerate(structure):
        channels = (*channels, *_block_channels(blocks))
        reach += 2 * len(blocks) + (2 if resample else 0)
        if not resample:
            channels = (*channels, *_block_channels(encoder.middle[::2]))
        resampled = resample.dim if resample else 0
        levels.append(Level(2 ** (len(structure) - 1 - k), frames, channels, resampled, reach))
        frames //= 2 if resample and resample.mode == "downsample3d" else 1
        channels, reach = (), 0
    return levels


def _block_channels(blocks) -> tuple[int, ...]:
    return tuple(c for block in blocks for c in (block.in_dim, block.out_dim))
