"""The training data: a folder of latents and prompts, and what each step takes from it.

    data/index.json                    {"samples": [4096, ...]}, how many each file has
    data/data-00000.safetensors        latents [n, 16, T, H, W], contexts [n, N, C] and, for image
                                       to video, images [n, 20, T, H, W] (mask, then latent)
    data/unconditional.safetensors     context [N, C], what guidance and dropped prompts take: for
                                       Wan the features of its usual negative prompt

Any float dtype; C is up to 4096 channels, those behind are 0. Latents are normalised as the network
knows them. For your own data write the same with write_data.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..checkpoint.sizes import TEXT_DIM
from .error import TrainingError

INDEX, UNCONDITIONAL = "index.json", "unconditional.safetensors"
SHARD = "data-{:05}.safetensors"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Samples on the device that trains.

    Attributes:
        latents: [B, 16, T, H, W] float32.
        context: [B, N, 4096] float32.
        image: [B, 20, T, H, W] float32, or None for text to video.
    """

    latents: torch.Tensor
    context: torch.Tensor
    image: torch.Tensor | None = None


def write_data(folder: Path, shards: Iterable[Tensors], unconditional: torch.Tensor) -> int:
    """Write a data folder; its index comes last, so that a folder with one is complete.

    Args:
        folder: which exists.
        shards: of each {"latents", "contexts"[, "images"]}, written as they come.
        unconditional: [N, C].

    Returns:
        How many samples there are.
    """
    counts = []
    for number, shard in enumerate(shards):
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}
        save_file(tensors, folder / SHARD.format(number))
        counts.append(len(shard["latents"]))
    save_file({"context": unconditional.detach().cpu().contiguous()}, folder / UNCONDITIONAL)
    (folder / INDEX).write_text(json.dumps({"samples": counts}), encoding="utf-8")
    return sum(counts)


class Data:
    """A data folder, on the device as a whole if it is small, else read as it is needed.

    Args:
        folder: see above.
        device: where batches are wanted.
        room: bytes that it may take there.

    Attributes:
        unconditional: [N, 4096] float32.

    Raises:
        TrainingError: no data, or a file of it is missing or damaged.
    """

    def __init__(self, folder: Path, device: torch.device, room: int = 4 << 30):
        self.folder, self.device = folder, device
        self.counts = _counts(folder)
        paths = [folder / SHARD.format(number) for number in range(len(self.counts))]
        try:
            self.files = [safe_open(path, "pt") for path in paths]
            with safe_open(folder / UNCONDITIONAL, "pt") as file:
                self.unconditional = _wide(file.get_tensor("context")[None].to(device))[0]
        except (OSError, SafetensorError) as error:
            raise TrainingError(
                f"the data in {folder} cannot be read ({error}): run the data stage again, or "
                "copy it back"
            ) from error
        self._check_counts()
        self.names = sorted(self.files[0].keys())
        self.whole = None
        if sum(path.stat().st_size for path in paths) <= room:
            self.whole = {
                name: torch.cat([file.get_tensor(name).to(device) for file in self.files])
                for name in self.names
            }

    def __len__(self) -> int:
        return sum(self.counts)

    def take(self, indices: torch.Tensor) -> Batch:
        """The samples of `indices` [B] int64, on the device that the data is on."""
        if self.whole is not None:
            found = {name: tensor[indices] for name, tensor in self.whole.items()}
        else:
            found = self._read(indices.tolist())
        image = found["images"].float() if "images" in found else None
        return Batch(found["latents"].float(), _wide(found["contexts"]), image)

    def check(self, latent: tuple[int, int, int], image: bool) -> None:
        """Raise a TrainingError unless samples are of this size, with a picture if one is due, and
        as many tokens as the unconditional context."""
        found = self.files[0].get_slice("latents").get_shape()[1:], "images" in self.names
        wanted = [16, *latent], image
        if found != wanted:
            has, takes = (
                f"latents {s} {'with' if i else 'without'} pictures" for s, i in (found, wanted)
            )
            raise TrainingError(
                f"{self.folder} has {has}, this preset takes {takes}: choose other data or another "
                "preset"
            )
        tokens = self.files[0].get_slice("contexts").get_shape()[1]
        if tokens != len(self.unconditional):
            raise TrainingError(
                f"{self.folder} has prompts of {tokens} tokens and an unconditional one of "
                f"{len(self.unconditional)}: write them again, padded alike"
            )

    def _check_counts(self) -> None:
        found = [file.get_slice("latents").get_shape()[0] for file in self.files]
        if found != self.counts:
            raise TrainingError(
                f"{self.folder / INDEX} counts {self.counts} samples, its files hold {found}: run "
                "the data stage again, or write them again"
            )

    def _read(self, indices: list[int]) -> Tensors:
        """One by one from the files, which are memory-mapped."""
        samples = []
        for index in indices:
            number = 0
            while index >= self.counts[number]:
                index -= self.counts[number]
                number += 1
            file = self.files[number]
            samples.append({name: file.get_slice(name)[index] for name in self.names})
        together = {name: torch.stack([sample[name] for sample in samples]) for name in self.names}
        return {name: tensor.to(self.device) for name, tensor in together.items()}


class Draws:
    """Where the random numbers of one slot of one step come from; nothing has to be saved.

    Each purpose has a generator of its own, seeded by (seed, step, slot, purpose), so that a
    resumed run and one on another number of GPUs see the same.
    """

    def __init__(self, seed: int, step: int, slot: int, device: torch.device):
        self.key, self.device = f"{seed}/{step}/{slot}", device

    def generator(self, purpose: str) -> torch.Generator:
        """The generator of `purpose`, at its start."""
        digest = hashlib.sha256(f"{self.key}/{purpose}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        return torch.Generator(self.device).manual_seed(seed)

    def normal(self, purpose: str, like: torch.Tensor) -> torch.Tensor:
        """N(0, 1) of the shape and dtype of `like`."""
        return torch.randn(
            like.shape, generator=self.generator(purpose), device=self.device, dtype=like.dtype
        )

    def batch(self, data: Data, count: int, purpose: str = "data") -> Batch:
        """`count` samples, any of them as likely as any other."""
        generator = self.generator(purpose)
        chosen = torch.randint(len(data), (count,), generator=generator, device=self.device)
        return data.take(chosen)


def drop_prompts(
    context: torch.Tensor, unconditional: torch.Tensor, share: float, generator: torch.Generator
) -> torch.Tensor:
    """`context` [B, N, 4096] with each prompt made `unconditional` [N, 4096] by chance `share`."""
    chance = torch.rand(len(context), generator=generator, device=context.device)
    return torch.where(chance[:, None, None] < share, unconditional, context)


def _counts(folder: Path) -> list[int]:
    try:
        return json.loads((folder / INDEX).read_text(encoding="utf-8"))["samples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(
            f"{folder} has no complete data ({INDEX} is missing or damaged): run the data stage, "
            "or name your own by --data"
        ) from error


def _wide(contexts: torch.Tensor) -> torch.Tensor:
    """[B, N, C] as float32 [B, N, 4096]."""
    return torch.nn.functional.pad(contexts.float(), (0, TEXT_DIM - contexts.shape[-1]))
