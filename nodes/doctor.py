"""TurboDoctor: what a bug report needs."""

import time

from comfy_api.latest import io, ui

from ..turbo_core.host.doctor import doctor_report
from .schema import schema


class TurboDoctor(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="TurboDoctor",
            display_name="Turbo Doctor (TurboDiffusion)",
            category="utilities",
            description="Tells what this machine runs TurboDiffusion with: GPU, versions, and "
            "which kernel each op uses and why. Its text is what a bug report needs.",
            search_aliases=["turbodiffusion", "system info", "bug report", "triton", "doctor"],
            inputs=[],
            outputs=[io.String.Output(display_name="report", tooltip="The text on the node.")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls):
        return time.monotonic()  # free memory changes: examine anew in every run

    @classmethod
    def execute(cls):
        text = doctor_report()
        return io.NodeOutput(text, ui=ui.PreviewText(text))
