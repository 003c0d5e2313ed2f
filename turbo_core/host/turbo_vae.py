"""TurboVAE: the host's Wan 2.1 VAE with our own way through its layers, on a copy of its VAE."""

import logging
from collections.abc import Callable, Iterator
from functools import partial

import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from comfy.ldm.wan.vae import AttentionBlock, Resample, ResidualBlock, WanVAE
from torch import Tensor

from ...kernels.dispatch import triton_unavailable
from ..parallel.parcels import UnsendableError
from ..parallel.workers import WorkerError, Workers
from ..staging import FromMemory, ToMemory
from ..vae_strips import (
    COMFORTABLE,
    LATENT,
    MOST_STRIPS,
    Strip,
    halos,
    strips_of,
    strips_within,
    video_bytes,
)
from . import split_vae
from .causal_vae import (
    decode_features,
    decode_pieces,
    decoder_levels,
    encode_latents,
    encode_pieces,
    encoder_levels,
)
from .gpu_workers import key_of, running_workers, uninterrupted
from .short_memory import tried_again
from .split_vae import pieces_of, shared_pieces, strips_for_all
from .versions import is_out_of_memory, on_device, pixels_dtype

log = logging.getLogger(__name__)

FRAMES = 4  # for one frame of the latents, but for the first
TILE = 32  # latents in a row of a tile, as the host takes them where its memory has run out


def accelerate_vae(vae):
    """`vae` with our way through its layers; itself, with a warning, where it is another VAE.

    The input and its weights stay as they are.
    """
    if isinstance(vae, TurboVAE):
        return vae
    if reason := why_not(vae):
        log.warning("TurboVAE leaves the VAE as it is: %s.", reason)
        return vae
    return TurboVAE.around(vae)


def why_not(vae) -> str | None:
    """Why this VAE cannot run through our own functions; None where it can."""
    if type(vae) is not comfy.sd.VAE:
        return f"it is a {type(vae).__name__}, and only ComfyUI's own VAE is known"
    if vae.device.type != "cpu" and (reason := triton_unavailable(vae.device)):
        return reason
    model = vae.first_stage_model
    if type(model) is not WanVAE:
        kind = f"{type(model).__module__}.{type(model).__name__}"
        return f"it holds a {kind}, and only Wan 2.1's is known"
    patched = {"decode", "encode", "forward"} & vars(model).keys()
    if patched:
        return f"something else has patched its {' and '.join(sorted(patched))}"
    ups, downs = model.decoder.upsamples, model.encoder.downsamples
    strange = {type(layer) for layer in (*ups, *downs)} - {ResidualBlock, Resample}
    middles = [type(x) for part in (model.decoder, model.encoder) for x in part.middle]
    if strange or middles != [ResidualBlock, AttentionBlock, ResidualBlock] * 2:
        return "its layers are not in the order of Wan 2.1"
    if model.decoder.head[-1].out_channels != model.encoder.conv1.in_channels:
        return "it does not give as many channels as it takes"
    return None


class PieceByPiece:
    """A Wan VAE model as the host calls it: on videos that are on the GPU, whole or tiles."""

    def __init__(self, model: WanVAE):
        self.model = model

    def __getattr__(self, name: str):
        if name == "model":  # nothing is there yet: somebody copies this object
            raise AttributeError(name)
        return getattr(self.model, name)

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, Z, T, H, W] to video [B, 3, T', H', W'] about in [-1, 1]."""
        features = decode_features(self.model, z)
        pieces = decode_pieces(self.model, features, None)
        return torch.cat(list(pieces), dim=1).movedim(-1, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Video [B, 3, T, H, W] in [-1, 1] to latents [B, Z, T', H / 8, W / 8]."""
        frames = (piece.contiguous() for piece in in_pieces(x.movedim(1, -1)))
        features = encode_pieces(self.model, frames, None)
        return encode_latents(self.model, torch.cat(list(features), dim=1))


class TurboVAE(comfy.sd.VAE):
    """The host's VAE; whole videos are decoded and encoded here, tiles where the host does it."""

    @classmethod
    def around(cls, vae: comfy.sd.VAE) -> "TurboVAE":
        """A VAE that shares the model, its patcher and its settings with `vae`."""
        turbo = cls.__new__(cls)
        vars(turbo).update(vars(vae))
        turbo.first_stage_model = PieceByPiece(vae.first_stage_model)
        for estimate in ("memory_used_decode", "memory_used_encode"):
            vars(turbo).pop(estimate)  # for the methods of that name
        return turbo

    def memory_used_decode(self, shape: tuple, dtype: torch.dtype) -> float:
        """Bytes beside the weights to decode latents [B, Z, T, H, W], see `_decode_bytes`."""
        return _comfortable(partial(self._decode_bytes, shape, dtype))

    def memory_used_encode(self, shape: tuple, dtype: torch.dtype) -> float:
        """Bytes beside the weights to encode pixels [B, C, T, H, W], see `_encode_bytes`."""
        return _comfortable(partial(self._encode_bytes, shape, dtype))

    def decode(self, samples_in: Tensor, vae_options: dict | None = None) -> Tensor:
        """Latents [B, Z, T, H, W] as video [B, 4 T - 3, 8 H, 8 W, C] in [0, 1].

        Raises:
            ValueError: these are not latents of a Wan video.
            out of memory: if the host's tiles do not fit either.
        """
        if samples_in.ndim != 5 or samples_in.shape[1] != self.latent_channels:
            raise ValueError(
                f"the Wan 2.1 VAE decodes latents [B, {self.latent_channels}, T, H, W], got "
                f"{list(samples_in.shape)}: connect the latents of a Wan model."
            )
        ways = self._decode, self._decode_in_tiles
        return self._in_strips(*ways, samples_in, self._decode_bytes, samples_in.shape)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """Video [T, H, W, C] or [B, T, H, W, C] in [0, 1] as latents [B, Z, (T + 3) / 4, ...].

        Raises:
            out of memory: if the host's tiles do not fit either.
        """
        channels = self.first_stage_model.encoder.conv1.in_channels
        videos = pixel_samples
        if videos.ndim == 4:
            videos = videos.unsqueeze(1 if self.not_video else 0)
        # Frame by frame: 0.3.75 would crop the frames of a batch as well.
        pixels = self.vae_encode_crop_pixels(videos.flatten(0, 1))[..., :channels]
        pixels = pixels.unflatten(0, videos.shape[:2])
        shape = pixels.movedim(-1, 1).shape
        ways = self._encode, self._encode_in_tiles
        return self._in_strips(*ways, pixels, self._encode_bytes, shape)

    def _in_strips(
        self, run: Callable, in_tiles: Callable, x: Tensor, need: Callable, shape: tuple
    ) -> Tensor:
        """run(x, strips) in as few strips as memory allows, in more where it does not after all,
        and in_tiles(x) where it does not in the most."""
        with on_device(self.device):
            count = self._load(need, shape)
            while True:
                try:
                    with tried_again(self.device, need(shape, self.vae_dtype, count)):
                        return run(x, count)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                # Here and not above: the exception would keep what it interrupted.
                comfy.model_management.soft_empty_cache()
                if count == MOST_STRIPS:
                    log.warning("Out of memory: TurboVAE goes on in ComfyUI's tiles.")
                    return in_tiles(x)
                count = min(2 * count, MOST_STRIPS)
                log.warning("Out of memory: TurboVAE tries again in %d strips.", count)

    def _decode_in_tiles(self, samples: Tensor) -> Tensor:
        return self.decode_tiled(samples, tile_x=TILE, tile_y=TILE, overlap=TILE // 4)

    def _encode_in_tiles(self, pixels: Tensor) -> Tensor:
        """Video by video, as 0.3.75 takes no batch."""
        size = {"tile_x": LATENT * TILE, "tile_y": LATENT * TILE, "overlap": LATENT * TILE // 4}
        return torch.cat([self.encode_tiled(video, **size) for video in pixels])

    def _load(self, need: Callable, shape: tuple) -> int:
        """Load the model, and say how many strips fit beside it."""
        in_strips = partial(need, shape, self.vae_dtype)
        count = strips_within(in_strips, COMFORTABLE)
        comfy.model_management.load_models_gpu(
            [self.patcher],
            memory_required=in_strips(count),
            force_full_load=self.disable_offload,
        )
        free = comfy.model_management.get_free_memory(self.device)
        return max(count, strips_within(in_strips, free))

    @torch.no_grad()
    def _decode(self, samples: Tensor, count: int) -> Tensor:
        batch, _, frames, height, width = samples.shape
        model, workers = self.first_stage_model.model, self._workers(samples)
        channels = model.decoder.head[-1].out_channels
        shape = batch, 1 + FRAMES * (frames - 1), LATENT * height, LATENT * width, channels
        out = torch.empty(shape, dtype=pixels_dtype(self), device=self.output_device)

        def write(decoded: Callable, strips: list[Strip], at_once: int = 1) -> None:
            memory = ToMemory(at_once)
            tick = progress(batch * len(strips) * frames)
            for item, pixels in zip(samples.split(1), out.split(1), strict=True):
                latents = item.to(self.device, self.vae_dtype)
                for strip, t, piece in decoded(model, latents, strips):
                    last = 1 + FRAMES * t
                    first = max(0, last - FRAMES)
                    part = pixels.narrow(strip.axis, *_span(strip.first, strip.last))
                    memory.copy(self.process_output(piece.to(out.dtype)), part[:, first:last])
                    tick()
            memory.finish()

        if workers is None or not self._shared(workers, samples, count, write):
            write(pieces_of, strips_of(height, width, count))
        return out

    def _workers(self, samples: Tensor) -> Workers | None:
        """Those that can share the decoding of `samples`; None where one GPU has to."""
        workers = running_workers(self.device)
        return workers if workers and max(samples.shape[3:]) >= workers.count else None

    def _shared(self, workers: Workers, samples: Tensor, count: int, write: Callable) -> bool:
        """`write` the pieces of `samples` that all ranks decode together, in `count` strips or some
        more; False, with a warning, where a worker cannot."""
        model, (height, width) = self.first_stage_model.model, samples.shape[3:]
        strips = strips_of(height, width, strips_for_all(count, workers.count, max(height, width)))
        key = key_of(model)
        weights = None if workers.known.get("vae") == key else model.state_dict()

        def own(ranks):
            with uninterrupted():
                write(partial(shared_pieces, ranks), strips, ranks.count)

        arguments = key, weights, samples, self.vae_dtype, len(strips)
        try:
            workers.together(split_vae.decode, arguments, own)
        except (WorkerError, UnsendableError) as error:
            log.warning("TurboVAE goes on with one GPU: %s", error)
            return False
        workers.notes["vae"] = key
        comfy.model_management.throw_exception_if_processing_interrupted()
        return True

    def make_room(self, shape: tuple, count: int) -> None:
        """Have the model on the GPU, with room to decode [B, Z, T, H, W] in `count` strips."""
        need = self._decode_bytes(shape, self.vae_dtype, count)
        comfy.model_management.load_models_gpu(
            [self.patcher], memory_required=need, force_full_load=self.disable_offload
        )

    @torch.no_grad()
    def _encode(self, pixels: Tensor, count: int) -> Tensor:
        batch, _, height, width, _ = pixels.shape
        model = self.first_stage_model.model
        strips = [None]
        if count > 1 and not (height % LATENT or width % LATENT):
            strips = strips_of(height // LATENT, width // LATENT, count)
        tick = progress(batch * len(strips) * len(in_pieces(pixels)))
        latents = []
        for item in pixels.split(1):
            parts = []
            for strip in strips:
                frames = self._frames_of(item, strip, tick)
                parts.append(torch.cat(list(encode_pieces(model, frames, strip)), dim=1))
            features = torch.cat(parts, dim=strips[0].axis) if strips[0] else parts[0]
            latents.append(encode_latents(model, features).to(self.output_device))
        return torch.cat(latents).to(pixels_dtype(self))

    def _frames_of(self, pixels: Tensor, strip: Strip | None, tick: Callable) -> Iterator[Tensor]:
        """The frames of one video that a strip is encoded from, on the GPU in [-1, 1]."""
        if strip:
            halo = halos(encoder_levels(self.first_stage_model.model)[:-1])[0]
            pixels = pixels.narrow(strip.axis, *_span(*strip.wider(halo)))
        memory = FromMemory(self.device)
        for piece in in_pieces(pixels):
            yield self.process_input(memory.copy(piece)).to(self.vae_dtype)
            tick()

    def _decode_bytes(self, shape: tuple, dtype: torch.dtype, count: int) -> float:
        """Of latents [B, Z, T, H, W]; the videos of a batch follow each other."""
        whole, *levels = decoder_levels(self.first_stage_model.model)
        return video_bytes(levels, whole, tuple(shape[2:]), count, dtype.itemsize)

    def _encode_bytes(self, shape: tuple, dtype: torch.dtype, count: int) -> float:
        """Of pixels [B, C, T, H, W]; the videos of a batch follow each other."""
        *levels, whole = encoder_levels(self.first_stage_model.model)
        frames, height, width = shape[2:]
        latents = (frames + FRAMES - 1) // FRAMES, -(-height // LATENT), -(-width // LATENT)
        return video_bytes(levels, whole, latents, count, dtype.itemsize)


def _comfortable(need: Callable[[int], float]) -> float:
    """What need(count) gives for the count of strips that is taken where memory is plenty."""
    return need(strips_within(need, COMFORTABLE))


def in_pieces(video: Tensor) -> list[Tensor]:
    """Views of [B, T, H, W, C]: the first frame, then four by four; what is left over is not."""
    starts = range(1, video.shape[1] - FRAMES + 1, FRAMES)
    return [video[:, :1], *(video[:, t : t + FRAMES] for t in starts)]


def progress(total: int) -> Callable[[], None]:
    """To call once a piece: moves the node's bar, and raises where the user has cancelled."""
    bar = comfy.utils.ProgressBar(total)

    def tick() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return tick


def _span(first: int, last: int) -> tuple[int, int]:
    """Latents from `first` to before `last` as the start and length of pixels."""
    return LATENT * first, LATENT * (last - first)
