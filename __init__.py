"""TurboDiffusion for Wan: TurboDiffusion checkpoints as ordinary ComfyUI MODELs."""

from comfy_api.latest import ComfyExtension

from .nodes import NODES
from .nodes.replacements import offer_replacements
from .turbo_core.host.scheduler import register_scheduler

WEB_DIRECTORY = "./web"


class TurboDiffusionExtension(ComfyExtension):
    async def on_load(self):
        await offer_replacements()

    async def get_node_list(self):
        return NODES


async def comfy_entrypoint():
    register_scheduler()
    return TurboDiffusionExtension()
