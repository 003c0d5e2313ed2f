"""W8A8Quantize: any Wan MODEL in INT8."""

from comfy_api.latest import io, ui

from ..turbo_core.granularity import GRANULARITIES
from ..turbo_core.host.quantize_model import quantize_model
from .schema import schema


class W8A8Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="W8A8Quantize",
            display_name="W8A8 Quantize (TurboDiffusion)",
            category="model/patch/wan",
            description="Any Wan MODEL with INT8 weights and activations: half the memory of "
            "16 bits, and faster.",
            search_aliases=["int8", "w8a8", "quantize", "turbodiffusion"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Wan 2.1 or 2.2 MODEL in bf16, fp16 or fp8, from any loader. LoRA "
                    "before or behind this node.",
                ),
                io.Combo.Input(
                    "granularity",
                    options=list(GRANULARITIES),
                    default="fast",
                    tooltip="Scales of the INT8 linears. fast: one per token and output channel. "
                    "exact: one per 128x128 block, as in TurboDiffusion's own files, slower.",
                ),
                io.Boolean.Input(
                    "report",
                    default=False,
                    tooltip="Measure the relative L2 error of every layer's weight.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="A new MODEL in INT8; the input is untouched."),
                io.String.Output(
                    display_name="report", tooltip="The errors as a table, if asked for."
                ),
            ],
        )

    @classmethod
    def execute(cls, model, granularity, report):
        quantized, table = quantize_model(model, granularity, report)
        shown = ui.PreviewText(table) if table else None
        return io.NodeOutput(quantized, table, ui=shown)
