"""TurboLoader: a TurboDiffusion checkpoint file to a MODEL."""

from comfy_api.latest import io

from ..turbo_core.granularity import GRANULARITIES
from ..turbo_core.host.load import load_turbo_model
from .model_files import CHECKPOINTS, FileInput, file_path, listed_or_why_not, plain_errors
from .schema import schema


class TurboLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="TurboLoader",
            display_name="Load TurboDiffusion Model",
            category="model/loaders",
            description="Loads a TurboDiffusion checkpoint for Wan 2.1 or 2.2 as an ordinary "
            "MODEL: INT8 weights stay INT8, sparse-linear attention is on.",
            search_aliases=["turbowan", "turbodiffusion", "sla", "int8", "wan"],
            essentials_category="Video Generation",
            inputs=[
                FileInput(
                    CHECKPOINTS,
                    "checkpoint",
                    tooltip="A file in models/diffusion_models, quantized (-quant) or not, "
                    ".pth or .safetensors. What it holds is read from the file, not from its name.",
                ),
                io.Combo.Input(
                    "granularity",
                    options=list(GRANULARITIES),
                    default="fast",
                    tooltip="Scales of the INT8 linears. fast: one per token and output channel. "
                    "exact: the checkpoint's own 128x128 blocks, slower. Float checkpoints have "
                    "none.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="A Wan MODEL for any sampler, LoRA or patch node.")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint=None):
        return listed_or_why_not(CHECKPOINTS, checkpoint)

    @classmethod
    def execute(cls, checkpoint, granularity):
        path = file_path(CHECKPOINTS, "checkpoint", checkpoint)
        with plain_errors():
            return io.NodeOutput(load_turbo_model(path, granularity))
