"""TurboSequenceParallel: one video on several GPUs of this computer."""

from comfy_api.latest import io

from ..turbo_core.host.sequence_parallel import share_among
from .schema import schema


class TurboSequenceParallel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="TurboSequenceParallel",
            display_name="Turbo Sequence Parallel (TurboDiffusion)",
            category="model/patch/wan",
            description="Lets several GPUs of this computer work on one video: each step of the "
            "sampler is shared by them. The video stays the same but for rounding.",
            search_aliases=["multi gpu", "two gpus", "parallel", "ulysses", "turbodiffusion"],
            essentials_category="Video Generation",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Wan MODEL with INT8 weights, with its LoRAs, patches and experts: "
                    "put this node last.",
                ),
                io.Int.Input(
                    "gpus",
                    default=2,
                    min=1,
                    max=40,
                    tooltip="How many GPUs to use. It has to divide the model's attention heads: "
                    "2, 4, 5 or 8 for 14B models, 2, 3, 4 or 6 for 1.3B. 1 uses one GPU as before.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The MODEL for any sampler. What cannot be shared runs on one GPU, and "
                    "the log says why."
                )
            ],
        )

    @classmethod
    def execute(cls, model, gpus):
        return io.NodeOutput(share_among(model, gpus))
