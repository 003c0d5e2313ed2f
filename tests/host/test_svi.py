"""WanSVIProImageToVideo: what a Wan image-to-video model is given for a clip of a long video."""

import pytest
import tiny_models
import torch
from in_comfyui import DEVICE, comfy
from turbodiffusion_pack.nodes.svi import WanSVIProImageToVideo
from turbodiffusion_pack.turbo_core.host.load import load_turbo_model

PROMPT, OTHER = [[torch.zeros(1, 4, 8), {"kept": 1}]], [[torch.ones(1, 4, 8), {}]]


def latent(frames: int, height: int = 4, width: int = 6, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"samples": torch.randn(1, 16, frames, height, width, generator=generator)}


def clip(
    anchor: dict,
    previous: dict | None = None,
    length: int = 21,
    motion_latents: int = 1,
    negative: list = OTHER,
):
    return WanSVIProImageToVideo.execute(
        PROMPT, negative, anchor, length, motion_latents, previous
    ).args


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "i2v.pth"
    tiny_models.write_checkpoint(path, tiny_models.i2v_checkpoint())
    return load_turbo_model(path)


def seen(wan, conditioning: list, empty: dict) -> torch.Tensor:
    """What the model sees beside the noise, [1, 4 + 16, F, H, W]: the mask, 1 where known."""
    values = {k: v for k, v in conditioning[0][1].items() if k.startswith("concat_")}
    return wan.model.concat_cond(noise=empty["samples"], device=DEVICE, **values).cpu()


def scaled(samples: torch.Tensor) -> torch.Tensor:
    """A LATENT as the model takes it."""
    return comfy.latent_formats.Wan21().process_in(samples)


def test_the_first_clip_sees_the_anchor_and_zeros(wan):
    anchor = latent(1)
    positive, negative, empty = clip(anchor)
    assert empty["samples"].shape == (1, 16, 6, 4, 6)
    assert not empty["samples"].any()
    for conditioning in (positive, negative):
        mask, given = seen(wan, conditioning, empty).split((4, 16), dim=1)
        assert torch.equal(mask[:, :, 0], torch.ones(1, 4, 4, 6))
        assert not mask[:, :, 1:].any()
        torch.testing.assert_close(given[:, :, :1], scaled(anchor["samples"]))
        torch.testing.assert_close(given[:, :, 1:], torch.zeros(1, 16, 5, 4, 6))


@pytest.mark.parametrize("motion_latents", [1, 2])
def test_a_later_clip_sees_the_end_of_the_one_before(wan, motion_latents):
    anchor, previous = latent(1), latent(6, seed=1)
    positive, _, empty = clip(anchor, previous, motion_latents=motion_latents)
    mask, given = seen(wan, positive, empty).split((4, 16), dim=1)
    assert mask[:, :, 0].all() and not mask[:, :, 1:].any(), "the motion is no known frame"
    end = previous["samples"][:, :, -motion_latents:]
    known = torch.cat([anchor["samples"], end], dim=2)
    torch.testing.assert_close(given[:, :, : 1 + motion_latents], scaled(known))
    torch.testing.assert_close(given[:, :, 1 + motion_latents :].abs().max(), torch.tensor(0.0))


def test_of_an_anchor_of_many_frames_the_first_counts(wan):
    anchor = latent(3)
    first = {"samples": anchor["samples"][:, :, :1]}
    shown = [seen(wan, p, empty) for p, _, empty in (clip(anchor), clip(first))]
    assert torch.equal(*shown)


def test_the_inputs_stay_as_they_are():
    anchor, previous = latent(1), latent(6, seed=1)
    before = anchor["samples"].clone(), previous["samples"].clone()
    positive, negative, _ = clip(anchor, previous)
    assert torch.equal(anchor["samples"], before[0]) and torch.equal(previous["samples"], before[1])
    assert PROMPT[0][1] == {"kept": 1} and OTHER[0][1] == {}
    assert positive[0][1]["kept"] == 1 and positive[0][0] is PROMPT[0][0]
    assert negative[0][0] is OTHER[0][0]


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"anchor": {"samples": torch.zeros(1, 4, 8, 8)}}, r"anchor_samples .*\[1, 4, 8, 8\]"),
        ({"anchor": "abc"}, r"anchor_samples must be .*got 'abc'"),
        ({"negative": 5}, r"negative must be a CONDITIONING, got the int 5\. Link it"),
        ({"previous": {"samples": torch.zeros(1, 48, 6, 4, 6)}}, r"prev_samples .*VAE Encode"),
        ({"previous": latent(6, 6, 4)}, r"are 32x48 \(batch 1\) and anchor_samples 48x32"),
        ({"previous": latent(1), "motion_latents": 2}, r"have 1 latent frames, fewer than the 2"),
        ({"length": 5, "previous": latent(6)}, r"length is 5 frames, .*1 motion latents.*use 9 or"),
        ({"length": 9, "previous": latent(6), "motion_latents": 2}, r"use 13 or more"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_clip_is_told(inputs, match):
    with pytest.raises(ValueError, match=match):
        clip(inputs.pop("anchor", latent(1)), **inputs)


def test_the_shortest_clips_that_leave_something_to_make():
    for length, previous in ((5, None), (9, latent(6))):
        assert clip(latent(1), previous, length)[2]["samples"].shape[2] == (length + 3) // 4
