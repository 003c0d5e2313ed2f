"""What TurboDiffusion's models were distilled for, and where a run does otherwise.

All of it may be wanted, so it is told and nothing is refused.
"""

import math
from dataclasses import dataclass

from .rcm import LATER_ANGLES, default_sigma_max, is_image_to_video
from .resolution import SIZES

# The resolutions that each checkpoint was published for, by its width and input channels.
TRAINED_AT = {(1536, 16): ("480p",), (5120, 16): ("480p", "720p"), (5120, 36): ("720p",)}
# A frame's area, as a share of that of 16:9: 4:3 is the smallest of TurboDiffusion's own sizes.
SMALLEST, LARGEST = 0.72, 1.15
MOST_STEPS = len(LATER_ANGLES) + 1
# rCM's second noise level: runs that start lower keep a part of a video, and mean to.
SECOND_ANGLE = LATER_ANGLES[0]


@dataclass(frozen=True)
class Run:
    """One sampler run of a TurboDiffusion model.

    Attributes:
        dim: width of the model.
        in_channels: its input channels, 36 for image to video.
        size: width and height of a frame in pixels.
        sigmas: the run's rectified-flow sigmas, descending.
        mode: "sde" or "ode" of rCM's sampler, empty with another sampler.
        cfg: guidance scale, 1 without guidance.
        has_image: whether the conditioning brings an image.
        retimed: whether a LoRA changes how the model reads timesteps.
    """

    dim: int
    in_channels: int
    size: tuple[int, int]
    sigmas: list[float]
    mode: str = ""
    cfg: float = 1.0
    has_image: bool = False
    retimed: bool = False


def advice(run: Run) -> list[str]:
    """A sentence on each thing that the model of `run` was not made for."""
    checks = (_image, _resolution, _steps, _start, _mode, _guidance, _second_distillation)
    return [sentence for check in checks if (sentence := check(run))]


def _image(run: Run) -> str | None:
    if is_image_to_video(run.in_channels) and not run.has_image:
        return (
            "this model animates a picture and gets none, so it makes one up: connect "
            "WanImageToVideo, or take a text-to-video model"
        )
    if run.has_image and not is_image_to_video(run.in_channels):
        return "this is a text-to-video model, the connected picture is not looked at"
    return None


def _resolution(run: Run) -> str | None:
    trained = TRAINED_AT.get((run.dim, run.in_channels))
    if trained is None or any(_fits(run.size, SIZES[name]["16:9"]) for name in trained):
        return None
    width, height = run.size
    sizes = " or ".join(f"{name} ({'x'.join(map(str, SIZES[name]['16:9']))})" for name in trained)
    return f"frames are {width}x{height}, this model was trained at {sizes}: expect less of others"


def _fits(size: tuple[int, int], trained: tuple[int, int]) -> bool:
    return SMALLEST <= math.prod(size) / math.prod(trained) <= LARGEST


def _steps(run: Run) -> str | None:
    steps = len(run.sigmas) - 1
    if steps <= MOST_STEPS:
        return None
    return f"{steps} steps, this model was distilled for 1 to {MOST_STEPS}: more cost time only"


def _start(run: Run) -> str | None:
    expected = default_sigma_max(run.in_channels)
    second = math.tan(SECOND_ANGLE)
    lowest = expected / (1 + expected)
    if not second / (1 + second) + 1e-4 < run.sigmas[0] < lowest - 1e-4:
        return None
    start = run.sigmas[0] / (1 - run.sigmas[0])
    kind = "image" if is_image_to_video(run.in_channels) else "text"
    return f"sigma_max is {start:.0f}, {kind} to video starts at {expected:.0f}"


def _mode(run: Run) -> str | None:
    if run.mode == "sde" and is_image_to_video(run.in_channels):
        return "mode is sde, the model's authors choose ode for image to video"
    return None


def _guidance(run: Run) -> str | None:
    if run.cfg == 1:
        return None
    return f"CFG is {run.cfg:g}, this model was distilled to run without: 1.0 is twice as fast"


def _second_distillation(run: Run) -> str | None:
    if not run.retimed:
        return None
    return (
        "a LoRA changes how this model reads timesteps, as those do that distill to few steps "
        "(lightx2v, CausVid, ...): it is distilled already, leave that LoRA out"
    )
