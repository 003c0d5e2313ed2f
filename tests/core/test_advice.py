"""What a run does otherwise than its model was distilled for."""

from dataclasses import replace

import pytest
from turbodiffusion_pack.turbo_core.advice import Run, advice
from turbodiffusion_pack.turbo_core.rcm import rcm_sigmas
from turbodiffusion_pack.turbo_core.resolution import SIZES, adaptive_size


def sigmas(steps: int, sigma_max: float) -> list[float]:
    return rcm_sigmas(steps, sigma_max).tolist()


TEXT_SMALL = Run(1536, 16, (832, 480), sigmas(4, 80), "sde")
TEXT = Run(5120, 16, (1280, 720), sigmas(4, 80), "sde")
IMAGE = Run(5120, 36, (1280, 720), sigmas(4, 200), "ode", has_image=True)


@pytest.mark.parametrize("run", [TEXT_SMALL, TEXT, IMAGE])
def test_what_the_authors_do_is_not_remarked_on(run):
    assert advice(run) == []
    assert advice(replace(run, mode="")) == []
    for steps in range(1, 5):
        assert advice(replace(run, sigmas=sigmas(steps, 1600))) == []


@pytest.mark.parametrize(
    ("run", "names"), [(TEXT_SMALL, ["480p"]), (TEXT, ["480p", "720p"]), (IMAGE, ["720p"])]
)
def test_all_sizes_of_the_resolution_fit(run, names):
    for name in names:
        areas = [adaptive_size(w, h, 832 * 480) for w, h in ((3, 1), (1, 2)) if name == "480p"]
        for size in (*SIZES[name].values(), *areas):
            assert advice(replace(run, size=size)) == [], size


def test_part_of_a_video_may_be_kept():
    """KSampler with a denoise below 1 starts at a later sigma."""
    for run in (TEXT, IMAGE):
        assert advice(replace(run, sigmas=run.sigmas[1:])) == []


def test_a_model_of_unknown_size_has_no_resolution():
    assert advice(replace(TEXT, dim=256, size=(160, 96))) == []


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (replace(IMAGE, has_image=False), "gets none, so it makes one up: connect WanImageToVideo"),
        (replace(TEXT, has_image=True), "a text-to-video model, the connected picture is not"),
        (
            replace(IMAGE, size=(832, 480)),
            "frames are 832x480, this model was trained at 720p (1280x720)",
        ),
        (replace(TEXT_SMALL, size=(1280, 720)), "was trained at 480p (832x480)"),
        (replace(TEXT, size=(512, 512)), "trained at 480p (832x480) or 720p (1280x720)"),
        (replace(TEXT, sigmas=sigmas(20, 80)), "20 steps, this model was distilled for 1 to 4"),
        (replace(IMAGE, sigmas=sigmas(4, 80)), "sigma_max is 80, image to video starts at 200"),
        (replace(TEXT, sigmas=sigmas(4, 20)), "sigma_max is 20, text to video starts at 80"),
        (replace(IMAGE, mode="sde"), "mode is sde, the model's authors choose ode for image"),
        (replace(TEXT, cfg=5.0), "CFG is 5, this model was distilled to run without"),
        (replace(TEXT, retimed=True), "distilled already, leave that LoRA out"),
    ],
)
def test_what_is_told(run, told):
    (sentence,) = advice(run)
    assert told in sentence
