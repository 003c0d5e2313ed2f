"""SimpleTuner's sla_attention.pt: SLA's projection of a model that it has tuned.

The file lies beside a checkpoint and holds one projection for every head width and dtype that the
training met, which all attentions of the model shared:
{"settings": {"topk": 0.2, ...}, "state": {"128:bf16": {"proj_l.weight": ..., ...}}, "version": 1}.
"""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from .checks import check_shapes, check_values
from .error import CheckpointError, errors_named, shown
from .file import mapped_tensors, pth_content
from .sizes import HEAD_DIM, linear_shapes

SUFFIXES = (".pt", ".pth")
PROJ_L = "proj_l"
DTYPES = ("bf16", "fp16", "fp32")  # the first of them that the file has counts


@dataclass(frozen=True)
class SharedProjection:
    """One projection for all blocks.

    Attributes:
        weight, bias: float [128, 128] and [128].
        topk: the share of key blocks that it was trained with.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    topk: float


def read_shared_projection(path: str | PathLike) -> SharedProjection | None:
    """The projection in SimpleTuner's sla_attention.pt; None for every other file.

    Raises:
        CheckpointError: such a file, but damaged, for other heads than 128 or another feature map.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        return None
    with errors_named(path):
        content, locate = pth_content(path)
        if not isinstance(content, dict) or not {"settings", "state"} <= content.keys():
            return None
        state, settings = content["state"], content["settings"]
        if not isinstance(state, dict) or not isinstance(settings, dict):
            return None
        _check_settings(settings)
        part = _part(state)
        tensors = mapped_tensors(path, part, locate)
        check_shapes(tensors, linear_shapes(PROJ_L, HEAD_DIM, HEAD_DIM))
        check_values(tensors)
        weight, bias = tensors[f"{PROJ_L}.weight"], tensors[f"{PROJ_L}.bias"]
        return SharedProjection(weight, bias, settings["topk"])


def _check_settings(settings: dict) -> None:
    topk, feature_map = settings.get("topk"), settings.get("feature_map")
    if feature_map != "softmax":
        raise CheckpointError(
            f"was trained with SLA's feature map {shown(feature_map, 40)}, only softmax is known "
            "here: train with SLA's defaults"
        )
    if not isinstance(topk, (int, float)) or not 0 < topk <= 1:
        raise CheckpointError(f"names the top-k {shown(topk, 40)}: download the file again")


def _part(state: dict) -> dict:
    """The listed tensors for heads of 128 channels."""
    for dtype in DTYPES:
        part = state.get(f"{HEAD_DIM}:{dtype}")
        if isinstance(part, dict):
            return part
    found = ", ".join(shown(key, 20) for key in list(state)[:3]) or "none"
    raise CheckpointError(
        f"has no projection for heads of {HEAD_DIM} channels, which Wan has, got {found}: choose "
        "the file of a Wan model"
    )
