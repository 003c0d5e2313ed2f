"""WanSVIProImageToVideo: a clip that goes on from the one before it, for SVI 2.0 Pro's LoRAs."""

from comfy_api.latest import io

from ..turbo_core.host.svi import condition_clip
from .schema import schema


class WanSVIProImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="WanSVIProImageToVideo",
            display_name="Wan SVI 2.0 Pro Image to Video (TurboDiffusion)",
            category="model/conditioning/wan",
            description="One clip of a long video: conditions Wan's image to video on the picture "
            "and the end of the clip before, as SVI 2.0 Pro's LoRAs were trained.",
            search_aliases=["svi", "stable video infinity", "long video", "extend video"],
            essentials_category="Video Generation",
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt of this clip."),
                io.Conditioning.Input(
                    "negative", tooltip="Not used without CFG: the prompt once more will do."
                ),
                io.Latent.Input(
                    "anchor_samples",
                    tooltip="The picture that the whole video keeps to, encoded by VAE Encode in "
                    "the video's size. The same for every clip.",
                ),
                io.Int.Input(
                    "length",
                    default=81,
                    min=5,
                    max=16381,
                    step=4,
                    tooltip="Frames of this clip, 4n + 1. SVI was trained with 81.",
                ),
                io.Int.Input(
                    "motion_latents",
                    default=1,
                    min=1,
                    max=16,
                    tooltip="How many of the last latent frames of prev_samples the clip goes on "
                    "from. SVI was trained with 1. Trim one more than that of the new clip.",
                ),
                io.Latent.Input(
                    "prev_samples",
                    optional=True,
                    tooltip="What the sampler made for the clip before, or the video so far. "
                    "Nothing: this is the first clip.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the guider."),
                io.Conditioning.Output(display_name="negative", tooltip="For a guider with CFG."),
                io.Latent.Output(display_name="latent", tooltip="Empty, for the sampler."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, anchor_samples, length, motion_latents, prev_samples=None):
        conditioned = condition_clip(
            positive, negative, anchor_samples, prev_samples, length, motion_latents
        )
        return io.NodeOutput(*conditioned)
