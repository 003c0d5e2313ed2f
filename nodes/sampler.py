"""rCMSampler: SAMPLER and SIGMAS of rCM for SamplerCustomAdvanced."""

from comfy_api.latest import io

from ..turbo_core.host.sampler import MODES, rcm_sampler
from ..turbo_core.rcm import rcm_sigmas
from .schema import schema


class RCMSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="rCMSampler",
            display_name="rCM Sampler (TurboDiffusion)",
            category="model/sampling/samplers",
            description="The sampler and sigmas TurboDiffusion models were distilled for: a video "
            "in 1 to 4 steps, without CFG.",
            search_aliases=["rcm", "turbodiffusion", "consistency", "few steps"],
            essentials_category="Video Generation",
            inputs=[
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=100,
                    tooltip="1 to 4 as the models were trained; more interpolate the schedule.",
                ),
                io.Float.Input(
                    "sigma_max",
                    default=80.0,
                    min=15.0,
                    max=10000.0,
                    step=10.0,
                    tooltip="80 for text to video, 200 for image to video; up to 1600 trades "
                    "diversity for quality.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="sde",
                    tooltip="sde adds fresh noise at every step; ode adds none and suits image to "
                    "video.",
                ),
            ],
            outputs=[
                io.Sampler.Output(tooltip="For SamplerCustomAdvanced."),
                io.Sigmas.Output(tooltip="For SamplerCustomAdvanced."),
            ],
        )

    @classmethod
    def execute(cls, steps, sigma_max, mode):
        return io.NodeOutput(rcm_sampler(mode), rcm_sigmas(steps, sigma_max))
