"""The toy world: its clips are the same everywhere, say what they show, and can be read back."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from turbodiffusion_pack.turbo_core.training.toy import reader, words, world

FRAMES, PIXELS = 9, 128  # the smaller world; the larger one has 17 frames of 256
ALL = len(world.WORDS["motion"]) * len(world.WORDS["speed"])


def clips(**fixed: int) -> world.Clips:
    """All motions at all speeds, else drawn, but for what is fixed."""
    drawn = world.draw(1, 0, ALL)._asdict()
    drawn["motion"] = torch.arange(ALL) // 2
    drawn["speed"] = torch.where(drawn["motion"] == world.STILL, 0, torch.arange(ALL) % 2)
    return world.Clips(**drawn | {name: torch.full((ALL,), v) for name, v in fixed.items()})


def read_right(seen: world.Clips, videos: torch.Tensor) -> dict[str, float]:
    reading = reader.read(videos)
    right = {n: getattr(reading, n) == getattr(seen, n) for n in world.WORDS}
    return {name: float(r.float().mean()) for name, r in right.items()}


def blurred(videos: torch.Tensor) -> torch.Tensor:
    """Over 5 pixels and from frame to frame."""
    frames = F.pad(videos.flatten(0, 1).movedim(-1, 1), (2,) * 4, mode="replicate")
    soft = F.avg_pool2d(frames, 5, 1).movedim(1, -1).view(videos.shape)
    return torch.cat([soft[:, :1], (soft[:, 1:] + soft[:, :-1]) / 2], dim=1)


def test_a_sample_is_the_same_on_every_machine():
    assert world.prompts(world.draw(0, 7, 3)) == [
        "a small orange circle in the north circles slowly on navy",
        "a big yellow square in the southwest moves up slowly on navy",
        "a small yellow triangle in the southwest bounces slowly on gray",
    ]
    assert world.prompts(world.draw(0, 7, 1), told=False) == [
        "a small orange circle circles slowly on navy"
    ]
    assert world.draw(0, 7, 1).start[0].tolist() == [0.3689494729042053, 0.21874040365219116]


def test_a_sample_is_its_seed_and_its_index():
    some, many = world.draw(3, 5, 4), world.draw(3, 0, 12).some(slice(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(some, many, strict=True))
    assert world.prompts(world.draw(3, 0, 12)) != world.prompts(world.draw(4, 0, 12))


def test_a_prompt_names_the_region_of_the_start():
    """Row by row; the region's corner and its middle are where the word says."""
    for i, region in enumerate(world.REGIONS):
        start = torch.tensor([(i % 3 + 0.9) / 3, (i // 3 + 0.1) / 3])
        clip = world.draw(0, 0, 1)._replace(start=start[None])
        (prompt,) = world.prompts(clip)
        assert f" in the {region} " in prompt
        corner = world.corner_of_region(start)
        assert corner.tolist() == pytest.approx([(i % 3) / 3, (i // 3) / 3])
        assert world.start_in(prompt) == pytest.approx((corner + 1 / 6).tolist())
    assert world.start_in("a red circle on black") == (0.5, 0.5)
    assert world.corner_of_region(torch.ones(2)).tolist() == pytest.approx([2 / 3, 2 / 3])


def test_every_value_is_as_likely_as_any_other():
    drawn = world.draw(0, 0, 4000)
    for name, values in world.WORDS.items():
        counted = getattr(drawn, name)
        if name == "speed":
            counted = counted[drawn.motion != world.STILL]
        expected = len(counted) / len(values)
        assert (counted.bincount() - expected).abs().max() < 4 * math.sqrt(expected), name
    assert (drawn.start.mean(0) - 0.5).abs().max() < 0.02
    assert (drawn.start.var(0) - 1 / 12).abs().max() < 0.004


@pytest.mark.parametrize("shape", range(4))
@pytest.mark.parametrize("size", range(2))
def test_a_shape_stays_in_the_frame_and_has_its_area(shape, size):
    """Wherever it starts, the corners of the room included."""
    seen = clips(shape=shape, size=size)
    for corner in ((0.0, 0.0), (1.0, 1.0)):
        seen = seen._replace(start=torch.tensor(corner).expand(ALL, 2))
        centre, radius = world.track(seen, FRAMES)
        inside = world.coverage(seen.shape[:, None].expand_as(radius), centre, radius, PIXELS)
        edge = torch.cat([inside[..., 0, :], inside[..., -1, :], inside[..., 0], inside[..., -1]])
        assert edge.max() == 0
        area = math.pi * (PIXELS * radius).square()
        assert (inside.sum((2, 3)) / area - 1).abs().max() < 0.02


def test_a_crop_is_a_part_of_the_whole():
    seen, corner = clips(), torch.tensor([[0.25, 0.125]]).expand(ALL, 2)
    whole = world.render(seen, FRAMES, PIXELS)
    part = world.render(seen, FRAMES, PIXELS, corner, 48)
    assert torch.allclose(part, whole[:, :, 16:64, 32:80], atol=1e-4)


def test_motions_go_where_they_say():
    left, right, up, down, circles, bounces, grows, still = world.path(17)[:, 1]
    assert left[-1].tolist() == [-0.25, 0, 0] and right[-1].tolist() == [0.25, 0, 0]
    assert up[-1].tolist() == [0, -0.25, 0] and down[-1].tolist() == [0, 0.25, 0]
    assert circles[:, 0].min() < -0.09 and circles[:, 1].max() > 0.19 and circles[1, 0] > 0
    assert bounces[4, 1] < -0.14 and abs(bounces[8, 1]) < 1e-6 and bounces[12, 1] < -0.14
    assert grows[-1, 2].exp() == pytest.approx(1.7) and not grows[:, :2].any()
    assert not still.any()


def test_prompts_say_what_is_seen():
    seen = clips()
    for row, prompt in enumerate(world.prompts(seen)):
        wanted = {name: int(getattr(seen, name)[row]) for name in world.WORDS}
        if wanted["motion"] == world.STILL:
            del wanted["speed"]
        assert world.properties(prompt) == wanted
    assert world.properties("something red over there") == {"colour": 0}


def test_a_word_is_the_same_signs_everywhere():
    signs = "".join("+-"[int(sign < 0)] for sign in words.word_signs("red"))
    assert signs == "+---++-++-+-++++-+-++---+---+-+-+++++---+-+++--------+-++-++--++"
    features = words.encode("A big red circle, moves left on black.")
    assert features.shape == (16, 4096) and not features[:, 64:].any() and not features[8:].any()
    assert torch.equal(features[2, :64], words.word_signs("red"))
    assert not words.encode("").any()


def test_words_of_another_world_are_silent_and_told(caplog):
    with caplog.at_level(logging.WARNING):
        features = words.encode("a red panda moves left")
    assert not features[2].any() and features[1].any() and "panda" in caplog.text
    with caplog.at_level(logging.WARNING):
        assert torch.equal(words.encode("red " * 17), words.encode("red " * 16))
    assert "17 words" in caplog.text


def test_words_are_far_from_each_other():
    vectors = torch.stack([words.word_signs(word) for word in sorted(words.VOCABULARY)])
    alike = vectors @ vectors.T / 64 - torch.eye(len(vectors))
    assert alike.abs().max() < 0.55


def test_clean_clips_are_read_without_a_mistake():
    for shape in range(4):
        for size in range(2):
            seen = clips(shape=shape, size=size)
            right = read_right(seen, world.render(seen, FRAMES, PIXELS))
            assert set(right.values()) == {1.0}, (shape, size, right)


def test_blur_and_noise_are_read_through():
    seen = clips(size=1)
    videos = blurred(world.render(seen, FRAMES, PIXELS))
    videos += 0.05 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    right = read_right(seen, videos)
    assert min(right.values()) > 0.93, right


def test_the_start_is_where_it_was():
    seen = clips()
    reading = reader.read(world.render(seen, FRAMES, PIXELS))
    assert (reading.start - world.track(seen, FRAMES)[0][:, 0]).abs().max() < 1e-3


def test_backwards_reads_as_the_other_way():
    """Left for right; nothing in this world shrinks, which at most passes for still."""
    seen = clips()
    reading = reader.read(world.render(seen, FRAMES, PIXELS).flip(1))
    assert reading.motion[:8].tolist() == [1, 1, 0, 0, 3, 3, 2, 2]
    assert reading.motion[12] in (-1, world.STILL) and reading.motion[13] == -1


def test_what_is_no_clip_reads_as_nothing():
    noise = torch.rand(2, FRAMES, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    empty = torch.full((2, FRAMES, 64, 64, 3), 0.45)
    gone = world.render(clips(), FRAMES, PIXELS)
    gone[:, 4] = gone[:, 4, :1, :1]
    for videos in (noise, empty, gone):
        reading = reader.read(videos)
        unread = [getattr(reading, n) for n in ("size", "colour", "shape", "motion", "speed")]
        assert all((values == -1).all() for values in unread)
    assert reader.say(reader.read(empty)) | {"background": "?"} == dict.fromkeys(world.WORDS, "?")
