"""The original's recorded forward passes and sampler runs, done again by this pack in ComfyUI.

Both are compared at the same block maps (tests/data/README.md): where two key blocks score nearly
alike, the last bit decides which of them is attended to, and the outputs are then 3e-3 to 1e-2
further apart. Which blocks are selected is judged by itself, by their scores in float64.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import goldens
import in_comfyui
import torch
from attention import exact_scores
from turbodiffusion_pack.kernels.block_map import block_map
from turbodiffusion_pack.kernels.norm import rms_norm
from turbodiffusion_pack.kernels.rope import apply_rope
from turbodiffusion_pack.turbo_core.host import self_attention
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model
from turbodiffusion_pack.turbo_core.host.patch import patch_attention
from turbodiffusion_pack.turbo_core.host.sampler import rcm_sampler
from turbodiffusion_pack.turbo_core.host.self_attention import sla, sla_from_projections
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings

# Of the image-to-video model there is the INT8 file only; it is held against bf16 outputs too.
CHECKPOINTS = {
    ("t2v", "bf16"): "t2v.pth",
    ("t2v", "int8"): "t2v-quant.pth",
    ("i2v_high", "bf16"): "i2v_high-quant.pth",
    ("i2v_high", "int8"): "i2v_high-quant.pth",
}
KEY = re.compile(
    r"(?P<inputs>(?P<model>\w+)\.\w+)\.out\.(?P<attention>\w+)\.(?P<weights>bf16|int8)"
    r"\.topk(?P<topk>[\d.]+)\.t(?P<timestep>\d+)"
)
RUN_TOPK = 0.3


def forward_keys(attention: str) -> list[str]:
    """The goldens of one forward pass with "sla" or with "original" (dense) attention."""
    return sorted(key for key in goldens.load("forward") if f".out.{attention}." in key)


@functools.cache
def load(checkpoint: str, granularity: str = "exact"):
    """The MODEL of a golden checkpoint; `load.cache_clear()` where no more are needed."""
    return load_turbo_model(str(goldens.checkpoint_file(checkpoint)), granularity)


def model_of(key: str, granularity: str = "exact"):
    """The MODEL whose velocity the golden `key` is."""
    parts = KEY.fullmatch(key)
    return load(CHECKPOINTS[parts["model"], parts["weights"]], granularity)


def forward_error(model, key: str, edit_image=None) -> float:
    """Relative error of the velocity of `model` for the golden `key`."""
    parts = KEY.fullmatch(key)
    # The keys name the timestep after the original's rounding; 988 stands for 987.5.
    timestep = {"988": 987.5, "600": 600.0}[parts["timestep"]]
    attention = {"original": "dense"}.get(parts["attention"], parts["attention"])
    settings = SLASettings(attention, float(parts["topk"]))
    model = patch_attention(model, settings)
    data, inputs = goldens.load("forward"), parts["inputs"]
    image = data.get(f"{inputs}.y")
    image = edit_image(image) if edit_image else image
    out = in_comfyui.velocity(
        model, data[f"{inputs}.x"], data[f"{inputs}.context"], timestep, image
    )
    return goldens.relative_error(out, data[key])


def in_sla(checkpoint: str, granularity: str = "exact"):
    """The MODEL of a golden checkpoint as the original's recorded runs have it."""
    model = load(checkpoint, granularity)
    return patch_attention(model, SLASettings("sla", RUN_TOPK))


class Run(NamedTuple):
    """One of the original's runs: `model` is t2v or i2v, the two experts with the boundary 0.9."""

    model: str
    steps: int
    sigma_max: int
    mode: str

    def __str__(self) -> str:
        return f"{self.model}.steps{self.steps}.smax{self.sigma_max}.{self.mode}"


def runs(model: str) -> list[Run]:
    """Those of `model` whose last state is on record."""
    every = [
        Run(model, steps, sigma_max, mode)
        for steps in (1, 2, 3, 4)
        for sigma_max in (80, 200, 1600)
        for mode in ("sde", "ode")
    ]
    return [run for run in every if f"{run}.x" in goldens.load("rcm")]


def run_error(model, run: Run, *, mode=None, sigma_max=None, noises=(1, 2, 3)) -> float:
    """Relative error of the last state of `model`; the keywords make one thing differ."""
    data = goldens.load("rcm")
    noise = iter([data[f"{run.model}.noise{i}"] for i in noises])
    sampler = rcm_sampler(mode or run.mode)
    sampler.extra_options["noise_sampler"] = lambda sigma, sigma_next: next(noise).to(
        in_comfyui.DEVICE
    )
    sigmas = rcm_sigmas(run.steps, sigma_max or run.sigma_max)
    first, context, image = (data.get(f"{run.model}.{n}") for n in ("noise0", "context", "y"))
    out = in_comfyui.sample(model, sampler, sigmas, first, context, image=image)
    return goldens.relative_error(out, data[f"{run}.x"])


@contextlib.contextmanager
def attention_changed(change: Callable) -> Iterator[None]:
    """Send every SLA call through change(run, q, k, proj, **options) -> output.

    `q` and `k` are normed and rotated; run(proj, **options) is the call itself.
    """
    whole, from_projections = sla, sla_from_projections

    def changed_whole(q, k, v, proj, **options):
        run = functools.partial(whole, q, k, v)
        return change(run, q, k, proj, **options)

    def changed_from_projections(q, k, v, norms, rotation, proj, **options):
        (k, _), v, (q, _) = k(), v(), q()
        pairs = zip((q, k), norms[:2], strict=True)
        normed = (rms_norm(x.flatten(2), weight, norms.eps).view_as(x) for x, weight in pairs)
        rotated = (apply_rope(x, *rotation) for x in normed)
        run = functools.partial(from_projections, q, k, v, norms, rotation)
        return change(run, *rotated, proj, **options)

    with (
        mock.patch.object(self_attention, "sla", changed_whole),
        mock.patch.object(self_attention, "sla_from_projections", changed_from_projections),
    ):
        yield


class Selection(NamedTuple):
    """What one SLA call attends to, and what it is to be chosen from.

    given: the block map [B, H, NQ, count] that the call got.
    own: the one it would have selected.
    scores: of all blocks in float64, [B, H, NQ, NK].
    """

    given: torch.Tensor
    own: torch.Tensor
    scores: torch.Tensor


@contextlib.contextmanager
def at_block_maps(maps: torch.Tensor | list[torch.Tensor]) -> Iterator[list[Selection]]:
    """Give SLA's calls these block maps, in order; later ones select for themselves."""
    left, selections = iter(maps), []

    def giving(run, q, k, proj, topk, **options):
        own = block_map(q.float(), k.float(), topk, backend="reference")
        given = next(left, own).to(q.device)
        selections.append(Selection(given, own, exact_scores(q, k)))
        return run(proj, block_map=given, **options)

    with attention_changed(giving):
        yield selections
