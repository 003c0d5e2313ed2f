"""Dynamic VRAM without a GPU: ComfyUI's own code for it, on top of stand-ins for comfy-aimdo.

Memory is plain memory, weights always find room in it but above a watermark, and "cpu:0", which to
ComfyUI is another device than the "cpu" where the weights are, plays the GPU. There are no streams,
nothing is pinned.
"""

import collections
import functools
import math


class Room:
    """comfy_aimdo.model_vbar.ModelVBAR: room on the GPU, taken when a weight is asked for.

    A weight that was asked for is pinned there until it is given back, which nobody may do twice.
    """

    def __init__(self, size, device, pageout_callback=None):
        self.used, self.memory, self.times = 0, {}, {}
        self.watermark = math.inf  # bytes from the start of its places that may find room
        self.pins = collections.Counter()  # place -> how often it was asked for and not given back

    def prioritize(self, malloc_async_clamp=None):
        self.watermark = math.inf

    def set_watermark(self, size):
        self.watermark = size
        self.memory = {place: m for place, m in self.memory.items() if place + m.nbytes <= size}

    def deprioritize(self):
        pass

    def alloc(self, size):
        place = self.used
        self.used += size
        return self, place, size

    def fault(self, place, size):
        import torch

        if place + size > self.watermark:
            return None
        if place not in self.memory:
            self.memory[place] = torch.full((size,), 255, dtype=torch.uint8)  # NaN until written
            self.times[place] = self.times.get(place, 0) + 1
        self.pins[place] += 1
        return self.times[place]

    def unpin(self, place, size):
        if not self.pins[place]:
            raise RuntimeError("VBAR unpin failed")
        self.pins[place] -= 1

    def loaded_size(self):
        return sum(memory.nbytes for memory in self.memory.values())

    def free_memory(self, size):
        freed = self.loaded_size()
        self.memory.clear()
        return freed


class CastBuffer:
    """comfy_aimdo.vram_buffer.VRAMBuffer: what a weight is brought into that has no room."""

    def __init__(self, size, device):
        self.memory = {}

    def size(self):
        return 0

    def get(self, size, offset):
        import torch

        self.memory[offset] = torch.empty(size, dtype=torch.uint8)
        return self, offset, size


class HostBuffer:
    """comfy_aimdo.host_buffer.HostBuffer, which stays empty as nothing is pinned."""

    size = 0

    def __init__(self, *_):
        pass


def enable() -> None:
    import comfy.model_management
    import comfy.model_patcher
    import comfy.ops
    import comfy.utils
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    import comfy_aimdo.vram_buffer
    import torch

    gpu = torch.device("cpu", 0)
    vbar = comfy_aimdo.model_vbar
    vbar.ModelVBAR = Room
    vbar.vbar_fault = lambda alloc: alloc[0].fault(*alloc[1:])
    vbar.vbar_unpin = lambda alloc: alloc[0].unpin(*alloc[1:])
    vbar.vbar_signature_compare = lambda a, b: a is not None and a == b
    comfy_aimdo.vram_buffer.VRAMBuffer = CastBuffer
    comfy_aimdo.host_buffer.HostBuffer = HostBuffer
    comfy_aimdo.torch.aimdo_to_tensor = lambda alloc, device: alloc[0].memory[alloc[1]]
    comfy.model_patcher.ModelPatcherDynamic.__new__ = lambda cls, *_, **__: object.__new__(cls)
    comfy.model_management.get_torch_device = lambda: gpu
    comfy.model_management.args.disable_pinned_memory = True
    comfy.utils.load_safetensors = _load_safetensors
    comfy.ops.cast_bias_weight = _casting_to(gpu, comfy.ops.cast_bias_weight)


def _casting_to(gpu, cast_bias_weight):
    """The host's function, which sees "cpu:0" where it is told "cpu", and no CPU in it."""
    import comfy.model_management as management

    is_device_cpu = management.is_device_cpu

    @functools.wraps(cast_bias_weight)
    def cast(op, input=None, dtype=None, device=None, **options):
        management.is_device_cpu = lambda device: False
        try:
            return cast_bias_weight(op, input, dtype, gpu, **options)
        finally:
            management.is_device_cpu = is_device_cpu

    return cast


def _load_safetensors(path):
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()
