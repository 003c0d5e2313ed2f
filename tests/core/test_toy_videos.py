"""The demo's check of its own videos: it passes what a prompt says and nothing else."""

import re
import sys
from pathlib import Path

import av
import pytest
import torch
import toy_videos
from turbodiffusion_pack.turbo_core.training.toy.words import VOCABULARY
from turbodiffusion_pack.turbo_core.training.toy.world import WORDS, properties

sys.path.append(str(Path(__file__).resolve().parents[1]))
import demo

PROMPTS = [prompt for prompts in demo.PROMPTS.values() for prompt in prompts]


def write_mp4(path: Path, video: torch.Tensor) -> Path:
    """As SaveVideo writes it, in H.264 with colour at half the resolution."""
    with av.open(path, "w") as container:
        stream = container.add_stream("h264", rate=16)
        stream.height, stream.width = video.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in toy_videos.as_bytes(video).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_the_prompt_says_is_seen_in_the_file(prompt, tmp_path):
    file = write_mp4(tmp_path / "video.mp4", toy_videos.clip(prompt))
    video = toy_videos.frames(file)
    assert video.shape == (toy_videos.FRAMES, toy_videos.PIXELS, toy_videos.PIXELS, 3)
    anywhere = re.sub(" in the [a-z]+", "", prompt)
    assert toy_videos.in_words(toy_videos.seen(video)) == anywhere
    assert demo.agrees(prompt, video)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_world_knows_every_word(prompt):
    """And the prompt says all that a clip has, so that nothing goes unread."""
    assert set(prompt.split()) <= VOCABULARY
    assert properties(prompt).keys() == WORDS.keys()


def test_another_video_does_not_pass(caplog):
    said = "a big red circle moves right slowly on black"
    other = said.replace("right", "left").replace("red", "blue")
    assert not demo.agrees(said, toy_videos.clip(other))
    assert "blue, asked for red; moves left, asked for moves right" in caplog.text


def test_a_video_in_another_region_does_not_pass(caplog):
    said = "a big red circle in the northwest moves right slowly on black"
    assert demo.agrees(said, toy_videos.clip(said))
    assert not demo.agrees(said, toy_videos.clip(said.replace("northwest", "southeast")))
    assert "asked for another region" in caplog.text


@pytest.mark.parametrize("kind", ["noise", "gray"])
def test_what_shows_nothing_does_not_pass(kind, caplog):
    size = (toy_videos.FRAMES, toy_videos.PIXELS, toy_videos.PIXELS, 3)
    noise = torch.rand(size, generator=torch.Generator().manual_seed(0))
    assert not demo.agrees(PROMPTS[0], noise if kind == "noise" else torch.full(size, 0.5))
    assert "?, asked for yellow; ?, asked for triangle" in caplog.text


@pytest.mark.parametrize("shown", ["as asked", "gray", "nothing made"])
def test_what_the_toy_shows_decides(shown, monkeypatch, tmp_path):
    prompt = PROMPTS[0]
    video = toy_videos.clip(prompt)
    video = video if shown == "as asked" else torch.full_like(video, 0.5)
    file = write_mp4(tmp_path / "a.mp4", video)
    made = None if shown == "nothing made" else file
    monkeypatch.setattr(demo, "PROMPTS", {"t2v": (prompt,)})
    monkeypatch.setattr(demo, "video_of", lambda server, workflow, wanted: made)
    failed = demo.show_toys(None, tmp_path / "demo.webp")
    assert failed == (shown != "as asked")
    assert (tmp_path / "demo.webp").exists() == (shown == "as asked")


def test_the_picture_to_animate_is_the_videos_first(tmp_path):
    prompt = demo.PROMPTS["i2v"][0]
    toy_videos.write_first_frame(prompt, tmp_path / "start.png")
    frame = torch.from_numpy(toy_videos.np.asarray(toy_videos.Image.open(tmp_path / "start.png")))
    assert torch.equal(frame, toy_videos.as_bytes(toy_videos.clip(prompt))[0])


def test_the_readmes_picture_plays_and_is_small(tmp_path):
    videos = {prompt: toy_videos.clip(prompt) for prompt in PROMPTS}
    toy_videos.write_picture(tmp_path / "demo.webp", videos)
    picture = toy_videos.Image.open(tmp_path / "demo.webp")
    assert picture.format == "WEBP" and picture.n_frames == toy_videos.FRAMES
    assert picture.width >= len(videos) * toy_videos.PIXELS
    assert (tmp_path / "demo.webp").stat().st_size < 300_000
    below = toy_videos.np.asarray(picture.convert("L"))[toy_videos.PIXELS :]
    for at in range(len(videos)):  # a prompt stands under each video, and is not cut off
        strip = below[:, at * (toy_videos.PIXELS + 4) :][:, : toy_videos.PIXELS]
        assert strip[5:-5].min() < 80 and strip[:, [0, 1, -2, -1]].min() > 200


def test_a_picture_too_large_for_a_readme_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_videos, "LARGEST_PICTURE", 1000)
    with pytest.raises(ValueError, match="more than 1000"):
        toy_videos.write_picture(tmp_path / "demo.webp", {PROMPTS[0]: toy_videos.clip(PROMPTS[0])})
    assert not (tmp_path / "demo.webp").exists()


def test_the_workflows_stand_at_the_demos_prompts():
    for name, prompts in demo.PROMPTS.items():
        workflow = demo.workflow_file(name)
        assert demo.node_inputs(workflow, "TurboTestTextEncode")["text"] == prompts[0]


def test_real_models_are_asked_for_real_videos(monkeypatch, tmp_path):
    """Users' own checkpoints: umT5, the Wan VAE, full size, and for a picture the ODE."""
    monkeypatch.setattr(demo, "find_model", lambda server, loader, name, pattern, example: example)
    video = demo.real_workflow(None, "i2v", [Path("a_high.pth"), Path("b_low.pth")])
    assert [entry["checkpoint"] for entry in demo.loaders(video)] == ["a_high.pth", "b_low.pth"]
    assert demo.node_inputs(video, "rCMSampler")["mode"] == "ode"
    assert demo.node_inputs(video, "WanAdaptiveResolution")["resolution"] == "720p"
    assert demo.node_inputs(video, "CLIPTextEncode")["text"] == demo.REAL_PROMPTS["i2v"]
    video = demo.real_workflow(None, "t2v", [Path("model.pth")])
    assert demo.node_inputs(video, "EmptyHunyuanLatentVideo")["length"] == 81
    assert demo.node_inputs(video, "VAELoader")["vae_name"] == demo.VAE
