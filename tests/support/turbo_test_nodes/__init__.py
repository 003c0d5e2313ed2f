"""A text encoder for tests: the toy world's words, each a vector of its own, and no weights.

It is a node, and also what ComfyUI's own loader makes of a file that holds nothing but WORDS, so
that a workflow made for umT5 runs in a test as it is. Another node gives as many tokens as umT5,
of noise; a third tells latents by their bits. With these comes a clock, see clock.py.
"""

import hashlib
import sys
from pathlib import Path

import comfy.sd
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors import safe_open

sys.path.append(str(Path(__file__).resolve().parents[1]))
import pack  # noqa: F401
from turbodiffusion_pack.turbo_core.training.toy.words import encode

from . import clock

WORDS = "turbo_test_words"
load_clip = comfy.sd.load_clip


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
        return io.NodeOutput(conditioning(text))


class TurboTestNoiseAsText(io.ComfyNode):
    """umT5's 512 tokens of 4096 channels, of noise."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboTestNoiseAsText",
            display_name="Test Noise as Text",
            category="testing",
            inputs=[io.Int.Input("seed")],
            outputs=[io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, seed: int) -> io.NodeOutput:
        generator = torch.Generator().manual_seed(seed)
        return io.NodeOutput([[0.1 * torch.randn(1, 512, 4096, generator=generator), {}]])


class TurboTestLatentBits(io.ComfyNode):
    """A hash of latents, told in the history once the images made of them are there."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboTestLatentBits",
            display_name="Test Latent Bits",
            category="testing",
            inputs=[io.Latent.Input("samples"), io.Image.Input("images")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, samples: dict, images: torch.Tensor) -> io.NodeOutput:
        bits = samples["samples"].contiguous().cpu().flatten().view(torch.uint8).numpy()
        return io.NodeOutput(ui={"bits": [hashlib.sha256(bits).hexdigest()[:12]]})


def conditioning(text: str) -> list:
    let_cpus_share()  # here, as all packs are loaded by now
    return [[encode(text)[None], {}]]


class Words:
    """As much of a CLIP as CLIPTextEncode asks for."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        return conditioning(tokens)


def let_cpus_share() -> None:
    """From now on processes share a video where there is no GPU, see the pack's gpu_workers.py."""
    for name, module in list(sys.modules.items()):
        if name.endswith(".turbo_core.host.gpu_workers"):
            module.ON_CPUS = True


def load_words_or_clip(ckpt_paths: list[str], *args, **kwargs):
    if holds_words(ckpt_paths[0]):
        return Words()
    return load_clip(ckpt_paths, *args, **kwargs)


def holds_words(path: str) -> bool:
    if Path(path).stat().st_size == 0:
        return False
    with safe_open(path, "pt") as file:
        return list(file.keys()) == [WORDS]


comfy.sd.load_clip = load_words_or_clip
clock.install()


class TestNodes(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TurboTestTextEncode, TurboTestNoiseAsText, TurboTestLatentBits]


async def comfy_entrypoint() -> TestNodes:
    return TestNodes()
