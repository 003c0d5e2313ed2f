"""WanAdaptiveResolution and WanVideoLength as nodes, on images and into ComfyUI's own nodes."""

import pytest
import torch
from in_comfyui import comfy
from turbodiffusion_pack.nodes.resolution import WanAdaptiveResolution, WanVideoLength

DEFAULTS = {
    node: {i.id: i.default for i in node.define_schema().inputs if getattr(i, "default", None)}
    for node in (WanAdaptiveResolution, WanVideoLength)
}


def _size(image=None, **choices):
    inputs = {**DEFAULTS[WanAdaptiveResolution], **choices}
    return WanAdaptiveResolution.execute(**inputs, image=image).args


def test_the_defaults_fit_an_image_at_480p():
    assert DEFAULTS[WanAdaptiveResolution]["resolution"] == "480p"
    assert _size(torch.zeros(1, 1080, 1920, 3)) == (848, 480)
    assert _size(torch.zeros(1, 1920, 1080, 3)) == (480, 848)


@pytest.mark.parametrize("shape", [(1, 270, 480, 3), (8, 270, 480, 3), (2, 270, 480, 4)])
def test_a_batch_has_one_size(shape):
    assert _size(torch.zeros(shape), resolution="720p") == (1280, 720)


def test_fixed_sizes_need_no_image():
    assert _size(aspect_ratio="9:16", resolution="720p") == (720, 1280)
    assert _size(torch.zeros(1, 8, 8, 3), aspect_ratio="9:16", resolution="720p") == (720, 1280)


def test_one_pixel_is_a_square():
    assert _size(torch.zeros(1, 1, 1, 3)) == (624, 624)


def test_without_an_image_it_says_what_to_do():
    with pytest.raises(ValueError, match=r"no image is connected\. Connect one, or choose"):
        _size()


def test_too_long_an_image_is_told_with_its_size():
    with pytest.raises(ValueError, match=r"longer than 8:1, it is 1x4096\. Crop or pad it"):
        _size(torch.zeros(1, 4096, 1, 3))


def test_the_smallest_custom_area_holds_the_longest_image():
    """What the widgets allow never fails for its area."""
    (megapixels,) = (
        i for i in WanAdaptiveResolution.define_schema().inputs if i.id == "megapixels"
    )
    image = torch.zeros(1, 8, 64, 3)
    assert _size(image, resolution="custom", megapixels=megapixels.min) == (288, 32)
    width, height = _size(image, resolution="custom", megapixels=megapixels.max)
    assert max(width, height) <= 16384, "ComfyUI's largest"


def test_sizes_become_latents():
    from nodes import EmptyLatentImage

    width, height = _size(torch.zeros(1, 333, 500, 3))
    assert width % 16 == height % 16 == 0
    samples = EmptyLatentImage().generate(width, height)[0]["samples"]
    assert samples.shape[2:] == (height // 8, width // 8)
    image = torch.rand(1, 3, 333, 500)
    # What WanImageToVideo does to its start image; next to nothing is cut off.
    assert comfy.utils.common_upscale(image, width, height, "bilinear", "center").shape[2:] == (
        height,
        width,
    )
    assert width / height == pytest.approx(500 / 333, rel=0.02)


def test_length_and_fps():
    assert WanVideoLength.execute(**DEFAULTS[WanVideoLength]).args == (81, 16.0)
    assert WanVideoLength.execute(0.0, 24.0).args == (1, 24.0)
    assert WanVideoLength.execute(10.0, 24.0).args == (241, 24.0)


def test_the_longest_length_is_one_that_comfyui_takes():
    seconds, fps = WanVideoLength.define_schema().inputs
    assert WanVideoLength.execute(seconds.max, fps.max).args[0] <= 16384


def test_every_input_and_output_has_a_tooltip():
    for node in (WanAdaptiveResolution, WanVideoLength):
        schema = node.define_schema()
        assert all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))
