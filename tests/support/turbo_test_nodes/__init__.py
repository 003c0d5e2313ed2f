"""A text encoder for tests: the toy world's words, each a vector of its own, and no weights."""

import sys
from pathlib import Path

from comfy_api.latest import ComfyExtension, io

sys.path.append(str(Path(__file__).resolve().parents[1]))
import pack  # noqa: F401
from turbodiffusion_pack.turbo_core.training.toy.words import encode


class TurboTestTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboTestTextEncode",
            display_name="Test Text Encode",
            category="testing",
            inputs=[io.String.Input("text", multiline=True)],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        return io.NodeOutput([[encode(text)[None], {}]])


class TestNodes(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TurboTestTextEncode]


async def comfy_entrypoint() -> TestNodes:
    return TestNodes()
