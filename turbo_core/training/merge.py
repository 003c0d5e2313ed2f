"""Merges the two trainings: base + (SLA - base) + (rCM - base) (TurboDiffusion, section 1.2).

SLA fine-tuning and rCM distillation start from the same base and never see each other, or SLA is
tuned on rCM's student, whose SHA-256 its file then tells. Their updates are added in float32,
tensor by tensor, so that it takes little memory beside the files.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..checkpoint import Checkpoint, CheckpointError, file_tensors, read_checkpoint
from ..checkpoint.checks import describe
from ..checkpoint.file import read_metadata
from ..checkpoint.names import BLOCK_NAME
from ..checkpoint.write import write_safetensors

Tensors = dict[str, torch.Tensor]

OUTSIDE = "outside the blocks"
ALIKE = 0.5  # cosine of two updates that learned the same, as trainings of different kinds do not
METADATA = "turbodiffusion_merge"
STUDENT = "student_sha256"  # in the metadata of an SLA that was tuned on rCM's student
WORKFLOW = ("format", "prompt", "workflow")  # what a file may say of itself that is no training
CHUNK = 2**24  # bytes that are hashed at once


@dataclass
class Update:
    """How much one part of the model, a block or what is outside of them, was changed.

    Attributes:
        weights: sum of squares of the base.
        sla: of SLA - base.
        rcm: of rCM - base.
        product: the two updates' inner product.
    """

    weights: float = 0.0
    sla: float = 0.0
    rcm: float = 0.0
    product: float = 0.0

    @property
    def cosine(self) -> float:
        """Of the two updates; 0 where one is zero."""
        lengths = math.sqrt(self.sla * self.rcm)
        return self.product / lengths if lengths else 0.0

    def add(self, base: torch.Tensor, sla: torch.Tensor, rcm: torch.Tensor) -> None:
        """Take in a tensor of the base and its two updates, float32."""
        self.weights += _inner(base, base)
        self.sla += _inner(sla, sla)
        self.rcm += _inner(rcm, rcm)
        self.product += _inner(sla, rcm)


Updates = dict[str, Update]


def merge_files(
    base: Path,
    sla: Path,
    rcm: Path,
    target: Path,
    weights: tuple[float, float] = (1.0, 1.0),
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Updates:
    """Write base + weights[0] (SLA - base) + weights[1] (rCM - base) to `target`.

    The file has the base's dtypes, ComfyUI's names and SLA's proj_l as they are, and says in its
    header what it was made of: names, SHA-256 and what each file says of its own training.

    Args:
        base: what both were trained from, as read_checkpoint takes it, like the other two.
        sla: tuned with SLA.
        rcm: distilled, with dense attention.
        target: a .safetensors file; it appears when it is complete.
        overwrite: whether an older `target` may be replaced.
        progress: called with (done, total) after each tensor.

    Returns:
        The updates by part of the model, see table.

    Raises:
        CheckpointError: a file is not usable, they do not belong together, see check_mergeable, or
            SLA was tuned on another student.
        ValueError: another suffix, or `target` is one of the files.
        OSError: `target` exists or could not be written; an older one is unchanged.
    """
    sources = {"base": base, "sla": sla, "rcm": rcm}
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} must end in .safetensors, got {target.suffix or 'no suffix'!r}")
    if target.exists() and any(p.exists() and target.samefile(p) for p in sources.values()):
        raise ValueError(f"{target} is one of the files to merge: choose another name")
    checkpoints = [read_checkpoint(path) for path in sources.values()]
    check_mergeable(*checkpoints)
    _check_student(sla, rcm)
    planned = file_tensors(_with_proj_l(checkpoints[0], checkpoints[1]), "comfy")
    updates: Updates = {}
    merged = merged_tensors(*checkpoints, weights, updates)
    metadata = {METADATA: json.dumps(_provenance(sources, weights))}
    write_safetensors(target, planned, merged, metadata, overwrite, progress)
    return updates


def check_mergeable(base: Checkpoint, sla: Checkpoint, rcm: Checkpoint) -> None:
    """Refuse checkpoints whose differences are no updates of one and the same model.

    Raises:
        CheckpointError: names or shapes differ, but for SLA's proj_l; weights are in 8 bits; or a
            file stands in another's place.
    """
    checkpoints = {"base": base, "SLA": sla, "rCM": rcm}
    for name, checkpoint in checkpoints.items():
        if checkpoint.has_sla != (name == "SLA"):
            there = "has no" if name == "SLA" else "has"
            raise CheckpointError(
                f"the {name} checkpoint {there} SLA projections (proj_l), of the three the one "
                "tuned with SLA alone has them: check the order of the files"
            )
        _check_floats(name, checkpoint)
        _check_alike(name, checkpoint, base)


def merged_tensors(
    base: Checkpoint,
    sla: Checkpoint,
    rcm: Checkpoint,
    weights: tuple[float, float] = (1.0, 1.0),
    updates: Updates | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything in the merged model, by ComfyUI's names; see merge_files.

    Args:
        updates: filled in as the tensors go by.

    Raises:
        CheckpointError: a merged tensor is not finite, or after the last one, a training has
            changed nothing.
    """
    updates = {} if updates is None else updates
    originals = file_tensors(_with_proj_l(base, sla), "comfy")
    for name, original in originals.items():
        if name not in base.tensors:  # proj_l, and settings of layers
            yield name, original
            continue
        start = original.float()
        by_sla, by_rcm = (other.tensors[name].float() - start for other in (sla, rcm))
        updates.setdefault(_part(name), Update()).add(start, by_sla, by_rcm)
        merged = (start + weights[0] * by_sla + weights[1] * by_rcm).to(original.dtype)
        if not merged.isfinite().all():
            raise CheckpointError(
                f"{name} became infinite or NaN in the merge: look at it in the three files"
            )
        yield name, merged
    for name, attribute in (("SLA", "sla"), ("rCM", "rcm")):
        if not any(getattr(update, attribute) for update in updates.values()):
            raise CheckpointError(
                f"the {name} checkpoint has the base's own weights, so there is no update to "
                "merge: check the order of the files"
            )


def table(updates: Updates) -> str:
    """The updates as lines of text: sizes relative to the weights of the part, and their cosine.

    The last line warns where the updates are alike, as they are when base and rCM change places.
    """
    lines = [f"{'part':20}{'SLA - base':>12}{'rCM - base':>12}{'cosine':>9}"]
    whole = Update()
    for part, update in updates.items():
        lines.append(_line(part, update))
        for name, value in vars(update).items():
            setattr(whole, name, getattr(whole, name) + value)
    lines.append(_line("all", whole))
    if whole.cosine > ALIKE:
        lines.append(
            f"The updates have much in common (cosine {whole.cosine:.2f}), as if base and rCM had "
            "changed places: check the order of the files."
        )
    return "\n".join(lines)


def _line(part: str, update: Update) -> str:
    size = math.sqrt(update.weights) or 1.0
    sla, rcm = math.sqrt(update.sla) / size, math.sqrt(update.rcm) / size
    return f"{part:20}{sla:>12.3%}{rcm:>12.3%}{update.cosine:>9.3f}"


def _part(name: str) -> str:
    block = BLOCK_NAME.match(name)
    return f"block {block[1]}" if block else OUTSIDE


def _inner(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a * b).sum(dtype=torch.float64).item()


def _with_proj_l(base: Checkpoint, sla: Checkpoint) -> Checkpoint:
    return replace(base, proj_l=sla.proj_l)


def _check_floats(name: str, checkpoint: Checkpoint) -> None:
    if checkpoint.quantized:
        raise CheckpointError(
            f"the {name} checkpoint is quantized, and an update is smaller than an INT8 step: take "
            "the plain file, and quantize what comes out"
        )
    for key, tensor in checkpoint.tensors.items():
        if tensor.itemsize < 2:
            raise CheckpointError(
                f"the {name} checkpoint has {key} in {describe(tensor)}, and an update is smaller "
                "than an 8-bit step: take the file in bf16, fp16 or fp32"
            )


def _check_alike(name: str, checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Refuse a tensor that only one of the two has, or that has another shape."""
    lonely = sorted(base.tensors.keys() ^ checkpoint.tensors.keys())
    if lonely:
        has, lacks = ("base", name) if lonely[0] in base.tensors else (name, "base")
        raise CheckpointError(
            f"the {has} checkpoint has {lonely[0]}, the {lacks} checkpoint has not, one of "
            f"{len(lonely)} such tensors: take files of one and the same model"
        )
    for key, tensor in checkpoint.tensors.items():
        if tensor.shape != base.tensors[key].shape:
            raise CheckpointError(
                f"{key} is {list(base.tensors[key].shape)} in the base and {list(tensor.shape)} in "
                f"the {name} checkpoint: take files of one and the same model"
            )


def _check_student(sla: Path, rcm: Path) -> None:
    """Refuse another student than SLA was tuned on, if it was: their updates make no model."""
    student = read_metadata(sla).get(STUDENT)
    if student and not (rcm.is_file() and sha256_of(rcm) == student):
        raise CheckpointError(
            f"{sla.name} was tuned on another student than {rcm.name}: take the rCM checkpoint "
            "that it was tuned on, or tune SLA again"
        )


def _provenance(sources: dict[str, Path], weights: tuple[float, float]) -> dict:
    """What the merged file says of where it comes from."""
    files = {}
    for (role, path), weight in zip(sources.items(), (1.0, *weights), strict=True):
        told = read_metadata(path)
        training = {name: text for name, text in told.items() if name not in WORKFLOW}
        files[role] = {"file": path.name, "weight": weight, "training": training}
        if path.is_file():
            files[role]["sha256"] = sha256_of(path)
    return {"formula": "base + weight (sla - base) + weight (rcm - base)", **files}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
