"""A text encoder for tests: the shape and the padding of umT5-XXL's output, without its weights."""

import hashlib

import torch
from comfy_api.latest import ComfyExtension, io

TEXT_LENGTH = 512
TEXT_DIM = 4096


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
        embedding = torch.zeros(1, TEXT_LENGTH, TEXT_DIM)
        for i, word in enumerate(text.split()[:TEXT_LENGTH]):
            embedding[0, i] = word_vector(word)
        return io.NodeOutput([[embedding, {}]])


def word_vector(word: str) -> torch.Tensor:
    """The same normal vector [4096] for the same word, in every process."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little", signed=True)
    return torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(seed))


class TestNodes(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TurboTestTextEncode]


async def comfy_entrypoint() -> TestNodes:
    return TestNodes()
