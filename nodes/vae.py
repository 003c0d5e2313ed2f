"""TurboVAE: the Wan 2.1 VAE that is connected, faster and in less memory."""

from comfy_api.latest import io

from ..turbo_core.host.turbo_vae import accelerate_vae
from .schema import schema


class TurboVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="TurboVAE",
            display_name="Turbo VAE (TurboDiffusion)",
            category="model/patch/wan",
            description="Makes the Wan 2.1 VAE faster and lets it do with less memory. Pictures "
            "and latents are the same but for rounding.",
            search_aliases=["vae", "decode", "encode", "fast vae", "wan vae", "turbodiffusion"],
            essentials_category="Video Generation",
            inputs=[
                io.Vae.Input(
                    "vae",
                    tooltip="A Wan 2.1 VAE, which Wan 2.2 A14B uses too. Any other VAE passes "
                    "through as it is, and the log says why.",
                ),
            ],
            outputs=[
                io.Vae.Output(
                    tooltip="The same VAE for VAE Decode, VAE Encode and all other nodes that "
                    "take one; the input is untouched."
                )
            ],
        )

    @classmethod
    def execute(cls, vae):
        return io.NodeOutput(accelerate_vae(vae))
