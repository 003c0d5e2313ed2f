"""Sizes and lengths of videos: the original's table, its adaptive resolution, and the edges."""

import math

import pytest
from turbodiffusion_pack.turbo_core.resolution import (
    ASPECT_RATIOS,
    RESOLUTIONS,
    SIZES,
    adaptive_size,
    video_length,
    video_size,
)

AREA = {"480p": 832 * 480, "720p": 1280 * 720}
IMAGES = [(w, h) for w in (1, 7, 500, 1023, 1920, 8000) for h in (1, 7, 500, 1080, 1333, 8000)]


@pytest.mark.parametrize(
    ("resolution", "aspect_ratio", "size"),
    [
        ("480p", "1:1", (640, 640)),
        ("480p", "4:3", (640, 480)),
        ("480p", "3:4", (480, 640)),
        ("480p", "16:9", (832, 480)),
        ("480p", "9:16", (480, 832)),
        ("720p", "1:1", (960, 960)),
        ("720p", "4:3", (960, 720)),
        ("720p", "3:4", (720, 960)),
        ("720p", "16:9", (1280, 720)),
        ("720p", "9:16", (720, 1280)),
    ],
)
@pytest.mark.parametrize("image", [None, (100, 100)])
def test_fixed_sizes_are_the_original_ones(resolution, aspect_ratio, size, image):
    assert video_size(resolution, aspect_ratio, 9.0, image) == size
    assert SIZES[resolution][aspect_ratio] == size


def test_every_choice_has_a_size():
    for resolution in RESOLUTIONS:
        for aspect_ratio in ASPECT_RATIOS:
            width, height = video_size(resolution, aspect_ratio, 0.38, (1920, 1080))
            assert width % 16 == height % 16 == 0


@pytest.mark.parametrize(
    ("image", "resolution", "size"),
    [
        ((832, 480), "480p", (832, 480)),
        ((1280, 720), "720p", (1280, 720)),
        ((720, 1280), "720p", (720, 1280)),
        ((1920, 1080), "480p", (848, 480)),  # exactly 842.6 x 473.9
        ((1920, 1080), "720p", (1280, 720)),
        ((4000, 3000), "480p", (736, 544)),  # exactly 729.7 x 547.3
        ((512, 512), "480p", (624, 624)),  # exactly 631.9
        ((1, 1), "720p", (960, 960)),
    ],
)
def test_an_image_keeps_its_aspect_ratio(image, resolution, size):
    assert video_size(resolution, "image", 9.0, image) == size


@pytest.mark.parametrize("area", [AREA["480p"], AREA["720p"], 3000, 4.0e6])
@pytest.mark.parametrize("image", [i for i in IMAGES if max(i) <= 8 * min(i)])
def test_each_side_is_the_nearest_multiple(image, area):
    exact = math.sqrt(area * image[0] / image[1]), math.sqrt(area * image[1] / image[0])
    for side, wanted in zip(adaptive_size(*image, area), exact, strict=True):
        assert side % 16 == 0 and side >= 16
        assert abs(side - wanted) <= 8


@pytest.mark.parametrize("image", [i for i in IMAGES if max(i) <= 8 * min(i)])
@pytest.mark.parametrize("resolution", ["480p", "720p"])
def test_the_area_stays_near_the_resolution(image, resolution):
    width, height = video_size(resolution, "image", 9.0, image)
    assert width * height == pytest.approx(AREA[resolution], rel=0.05)


@pytest.mark.parametrize(
    ("aspect_ratio", "image", "size"),
    [("16:9", None, (1360, 768)), ("1:1", None, (1024, 1024)), ("image", (300, 100), (1776, 592))],
)
def test_a_custom_area(aspect_ratio, image, size):
    """One megapixel as ComfyUI counts: 1024 x 1024."""
    assert video_size("custom", aspect_ratio, 1.0, image) == size


def test_an_image_of_8_to_1_is_the_longest():
    assert video_size("480p", "image", 1.0, (800, 100)) == (1792, 224)
    assert video_size("480p", "image", 1.0, (1, 8)) == (224, 1792)
    for image in ((801, 100), (1, 9), (4096, 1)):
        with pytest.raises(ValueError, match=f"longer than 8:1, it is {image[0]}x{image[1]}. Crop"):
            video_size("480p", "image", 1.0, image)


def test_no_image():
    with pytest.raises(ValueError, match=r"no image is connected. Connect one, or choose a fixed"):
        video_size("480p", "image", 1.0)


@pytest.mark.parametrize("image", [(0, 100), (100, 0)])
def test_an_image_without_pixels(image):
    with pytest.raises(ValueError, match=f"it is {image[0]}x{image[1]}. Connect another one"):
        video_size("480p", "image", 1.0, image)


@pytest.mark.parametrize("megapixels", [0.0, 0.001, -1.0, math.nan, math.inf, 65.0, 1e300])
def test_no_area(megapixels):
    with pytest.raises(ValueError, match=r"at least 2048 pixels, got .*\. Raise .* to 64 at most"):
        video_size("custom", "image", megapixels, (16, 9))


def test_unknown_choices():
    with pytest.raises(ValueError, match="resolution must be one of 480p, 720p, custom, got '4k'"):
        video_size("4k", "1:1", 1.0)
    with pytest.raises(ValueError, match=r"aspect_ratio must be one of image, 16:9.* got '2:1'"):
        video_size("480p", "2:1", 1.0)


@pytest.mark.parametrize(
    ("seconds", "fps", "length"),
    [
        (5, 16, 81),  # 80
        (5, 24, 121),  # 120
        (3.25, 16, 53),  # 52
        (0, 16, 1),
        (0.1, 16, 1),  # 1.6
        (0.1875, 16, 5),  # 3, as near to 1 as to 5
        (79 / 16, 16, 81),  # 79, as near to 77 as to 81
        (78.9 / 16, 16, 77),
        (81 / 16, 16, 81),
        (1, 23.976, 25),
        (120, 120, 14401),
    ],
)
def test_length(seconds, fps, length):
    assert video_length(seconds, fps) == length


def test_lengths_are_the_nearest_of_their_kind():
    for frames in range(1, 400):
        length = video_length(frames / 16, 16)
        assert length % 4 == 1
        assert -2 <= frames - length < 2  # the longer one of two as near


@pytest.mark.parametrize(
    ("seconds", "fps", "told"),
    [
        (-1, 16, "seconds must be 0 or more, got -1"),
        (math.nan, 16, "seconds must be 0 or more, got nan"),
        (math.inf, 16, "seconds must be 0 or more, got inf"),
        (5, 0, "fps must be above 0, got 0"),
        (5, -24, "fps must be above 0, got -24"),
        (5, math.nan, "fps must be above 0, got nan"),
        (1e300, 16, r"at most 100000 frames, got 1e\+300 seconds at 16 fps. Make it shorter"),
        (1e300, 1e300, "at most 100000 frames"),
    ],
)
def test_no_length(seconds, fps, told):
    with pytest.raises(ValueError, match=told):
        video_length(seconds, fps)
