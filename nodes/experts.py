"""Wan22ExpertSwitch: the two experts of a Wan 2.2 A14B model as one MODEL."""

from comfy_api.latest import io

from ..turbo_core.host.experts import switch_experts
from .schema import schema


class Wan22ExpertSwitch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="Wan22ExpertSwitch",
            display_name="Wan 2.2 Expert Switch (TurboDiffusion)",
            category="model/patch/wan",
            description="Makes one MODEL of the high-noise and the low-noise expert of Wan 2.2 "
            "A14B: it changes over within one sampler run.",
            search_aliases=["wan 2.2", "a14b", "high noise", "low noise", "moe", "turbodiffusion"],
            essentials_category="Video Generation",
            inputs=[
                io.Model.Input(
                    "model_high",
                    tooltip="The high-noise expert, with its own LoRAs and patches. It starts the "
                    "run.",
                ),
                io.Model.Input(
                    "model_low",
                    tooltip="The low-noise expert, with its own LoRAs and patches. It ends the "
                    "run.",
                ),
                io.Float.Input(
                    "boundary",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    round=0.001,
                    tooltip="model_high denoises while sigma is at or above this, model_low below. "
                    "0.9 for image to video, 0.875 for text to video.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="One MODEL for any sampler. LoRAs and patches behind this node reach "
                    "model_high only: put them before it."
                )
            ],
        )

    @classmethod
    def execute(cls, model_high, model_low, boundary):
        return io.NodeOutput(switch_experts(model_high, model_low, boundary))
