"""TurboSaveCheckpoint: a Wan MODEL to a checkpoint file."""

import os.path
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..turbo_core.host.save import save_turbo_model, workflow_metadata
from .schema import schema


class TurboSaveCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="TurboSaveCheckpoint",
            display_name="Save TurboDiffusion Model",
            category="model/merging",
            description="Saves a Wan MODEL as a .safetensors checkpoint for Load TurboDiffusion "
            "Model: INT8 weights and SLA projections as they are, LoRAs baked in.",
            search_aliases=["export model", "checkpoint save", "turbodiffusion", "int8"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Wan MODEL with float weights or this pack's INT8 weights. LoRAs on "
                    "it are baked in; its attention settings are not saved.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/TurboDiffusion",
                    tooltip="Folder and start of the file's name in ComfyUI's output folder; a "
                    "number is added. Loaders list what is in output/diffusion_models.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, filename_prefix):
        output = folder_paths.get_output_directory()
        _check_inside(output, filename_prefix)
        metadata = workflow_metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo)
        path = _numbered(filename_prefix, output)
        try:
            save_turbo_model(model, path, metadata)
        except FileExistsError:  # another server took the number while this one wrote
            path = _numbered(filename_prefix, output)
            save_turbo_model(model, path, metadata)
        return io.NodeOutput(ui=ui.PreviewText(os.path.relpath(path, output)))


def _numbered(filename_prefix: str, output: str) -> Path:
    """The file with the next number that is free."""
    folder, name, counter, *_ = folder_paths.get_save_image_path(filename_prefix, output)
    return Path(folder, f"{name}_{counter:05}_.safetensors")


def _check_inside(output: str, filename_prefix: str) -> None:
    """Refuse what the host would, whose message tells where the output folder is."""
    path = os.path.abspath(os.path.join(output, filename_prefix))
    if path == os.path.abspath(output):
        raise ValueError(
            f"filename_prefix needs a name, got {filename_prefix!r}: choose one such as "
            "diffusion_models/TurboDiffusion"
        )
    if not Path(path).parent.is_relative_to(os.path.abspath(output)):
        raise ValueError(
            f"filename_prefix {filename_prefix!r} is outside the output folder, where saving is "
            "not allowed: choose a folder and name inside it"
        )
