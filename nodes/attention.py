"""SLAAttentionPatch: sparse-linear attention on a Wan MODEL."""

from comfy_api.latest import io

from ..kernels.dispatch import BACKENDS
from ..turbo_core.host.patch import patch_attention, wan_model
from ..turbo_core.host.projections import attach_projections
from ..turbo_core.sla_settings import ATTENTIONS, SLASettings, parse_blocks
from .model_files import CHECKPOINTS, FileInput, file_path, listed_or_why_not, plain_errors
from .schema import schema

NONE = "none"
OR_NONE = ", or choose none"


class SLAAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SLAAttentionPatch",
            display_name="SLA Attention (TurboDiffusion)",
            category="model/patch/wan",
            description="Chooses the self-attention of a Wan MODEL: sparse-linear attention in "
            "8 or 16 bits, or dense.",
            search_aliases=["sla", "sagesla", "sparse attention", "turbodiffusion"],
            advanced=("dense_blocks", "dense_steps", "backend", "projections"),
            inputs=[
                io.Model.Input("model", tooltip="A Wan 2.1 or 2.2 MODEL."),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTIONS),
                    default="sagesla",
                    tooltip="sagesla: SLA with INT8 queries and keys, fastest. sla: SLA in 16 "
                    "bits. dense: ComfyUI's own attention.",
                ),
                io.Float.Input(
                    "topk",
                    default=0.1,
                    min=0.001,
                    max=1.0,
                    step=0.01,
                    round=0.001,
                    tooltip="Share of the key blocks that get exact attention. 0.1 is fast, 0.15 "
                    "is the authors' choice for best quality.",
                ),
                io.String.Input(
                    "dense_blocks",
                    default="",
                    tooltip="Transformer blocks that keep dense attention, such as '0, 38-39'.",
                ),
                io.Int.Input(
                    "dense_steps",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="How many of the first sampling steps keep dense attention.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="auto",
                    tooltip="Kernels of the attention. auto: Triton where it can run. triton: "
                    "that or an error. reference: plain torch, slow.",
                ),
                FileInput(
                    CHECKPOINTS,
                    "projections",
                    first=(NONE,),
                    default=NONE,
                    optional=True,
                    tooltip="A TurboDiffusion checkpoint of the same model size, or SimpleTuner's "
                    "sla_attention.pt, whose SLA projections this MODEL gets; nothing else of it "
                    "is used. none: those the MODEL has.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The MODEL with this attention; the input is untouched.")
            ],
        )

    @classmethod
    def validate_inputs(cls, projections=NONE):
        return projections == NONE or listed_or_why_not(CHECKPOINTS, projections, OR_NONE)

    @classmethod
    def execute(cls, model, attention, topk, dense_blocks, dense_steps, backend, projections=NONE):
        blocks = parse_blocks(dense_blocks, len(wan_model(model).blocks))
        settings = SLASettings(attention, topk, blocks, dense_steps, backend)
        if projections != NONE:
            path = file_path(CHECKPOINTS, "projections", projections, OR_NONE)
            with plain_errors():
                model = attach_projections(model, path)
        return io.NodeOutput(patch_attention(model, settings))
