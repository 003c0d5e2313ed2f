"""ComfyUI's own kernels (comfy-kitchen), for the benchmarks to measure beside ours."""

from types import ModuleType


def find() -> ModuleType | None:
    """comfy_kitchen with its CUDA kernels; None where it is missing or they do not load."""
    try:
        import comfy_kitchen
    except ImportError:
        return None
    if not comfy_kitchen.list_backends()["cuda"]["available"]:
        return None
    return comfy_kitchen
