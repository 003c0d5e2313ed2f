"""TurboLoraLoader: a LoRA in any spelling on a Wan MODEL, and what became of it."""

from comfy_api.latest import io, ui

from ..turbo_core.host.lora import add_lora
from .model_files import LORAS, FileInput, file_path, listed_or_why_not, plain_errors
from .schema import schema


class TurboLoraLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="TurboLoraLoader",
            display_name="Load Wan LoRA (TurboDiffusion)",
            category="model/loaders",
            description="Loads a LoRA for Wan in any spelling (ComfyUI, diffusers, PEFT, "
            "DiffSynth, kohya, LyCORIS) and tells what of it fits the MODEL.",
            search_aliases=["lora", "wan lora", "diffusers", "peft", "lycoris", "turbodiffusion"],
            essentials_category="Video Generation",
            inputs=[
                io.Model.Input(
                    "model", tooltip="A Wan MODEL from any loader; INT8 weights stay INT8."
                ),
                FileInput(LORAS, "lora_name", tooltip="A file in models/loras."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How strongly to change the MODEL; below 0 the other way. 0 leaves it "
                    "as it is.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The MODEL with the LoRA; the input is untouched."),
                io.String.Output(
                    display_name="report", tooltip="What matched, what did not, rank and alpha."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        return listed_or_why_not(LORAS, lora_name)

    @classmethod
    def execute(cls, model, lora_name, strength):
        path = file_path(LORAS, "lora_name", lora_name)
        with plain_errors():
            model, report = add_lora(model, path, strength)
        return io.NodeOutput(model, report, ui=ui.PreviewText(report))
