"""WanAdaptiveResolution and WanVideoLength: how large and how long a Wan video is."""

import reprlib

from comfy_api.latest import io

from ..turbo_core.resolution import ASPECT_RATIOS, RESOLUTIONS, video_length, video_size
from .schema import schema


class WanAdaptiveResolution(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="WanAdaptiveResolution",
            display_name="Wan Adaptive Resolution (TurboDiffusion)",
            category="model/latent/wan",
            description="Width and height of a Wan video: an image's aspect ratio at the area of "
            "480p or 720p, or one of TurboDiffusion's fixed sizes.",
            search_aliases=["resolution", "size", "aspect ratio", "480p", "720p", "turbodiffusion"],
            essentials_category="Video Tools",
            inputs=[
                io.Combo.Input(
                    "resolution",
                    options=list(RESOLUTIONS),
                    default="480p",
                    tooltip="What the model was trained for. custom: the area of megapixels.",
                ),
                io.Combo.Input(
                    "aspect_ratio",
                    options=list(ASPECT_RATIOS),
                    default="image",
                    tooltip="image: that of the connected image, at the area of the resolution. "
                    "The others are TurboDiffusion's fixed sizes and need no image.",
                ),
                io.Float.Input(
                    "megapixels",
                    default=0.38,
                    min=0.01,
                    max=16.0,
                    step=0.01,
                    tooltip="Area of a custom resolution, in units of 1024x1024 pixels. 0.38 is "
                    "832x480, 0.88 is 1280x720.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The image to animate; of a batch all have one size. It is looked at, "
                    "not changed.",
                ),
            ],
            outputs=[
                io.Int.Output(display_name="width", tooltip="A multiple of 16."),
                io.Int.Output(display_name="height", tooltip="A multiple of 16."),
            ],
        )

    @classmethod
    def execute(cls, resolution, aspect_ratio, megapixels, image=None):
        size = None if image is None else _size(image)
        return io.NodeOutput(*video_size(resolution, aspect_ratio, megapixels, size))


def _size(image) -> tuple[int, int]:
    """Width and height of an IMAGE [B, H, W, C]; a client may write anything in its place."""
    if getattr(image, "ndim", None) != 4:
        raise ValueError(
            f"image must be an IMAGE, got the {type(image).__name__} {reprlib.repr(image)}. Link "
            "it to a node that loads one."
        )
    return image.shape[2], image.shape[1]


class WanVideoLength(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="WanVideoLength",
            display_name="Wan Video Length (TurboDiffusion)",
            category="model/latent/wan",
            description="Frames of a Wan video from its seconds: the nearest 4n + 1.",
            search_aliases=["frames", "length", "seconds", "fps", "4n+1", "turbodiffusion"],
            essentials_category="Video Tools",
            inputs=[
                io.Float.Input(
                    "seconds",
                    default=5.0,
                    min=0.0,
                    max=120.0,
                    step=0.25,
                    round=0.001,
                    tooltip="How long the video is to be. The models learned from 5 seconds.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    round=0.001,
                    tooltip="Frames per second. The models learned from 16.",
                ),
            ],
            outputs=[
                io.Int.Output(
                    display_name="length",
                    tooltip="For the length of an empty latent or WanImageToVideo: the nearest "
                    "4n + 1 frames, the longer one of two as near.",
                ),
                io.Float.Output(display_name="fps", tooltip="The fps again, for Create Video."),
            ],
        )

    @classmethod
    def execute(cls, seconds, fps):
        return io.NodeOutput(video_length(seconds, fps), fps)
