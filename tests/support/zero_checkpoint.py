"""Large checkpoints of zeros in the official format, for the tests that measure memory."""

import torch
from turbodiffusion_pack.turbo_core.checkpoint.names import PROJ_L
from turbodiffusion_pack.turbo_core.checkpoint.sizes import BLOCK_LINEARS, Sizes, wan_shapes


def official_zeros(num_layers: int, quantized: bool = True) -> dict[str, torch.Tensor]:
    """A checkpoint in the official format, 64 MiB (INT8) or 128 MiB (bf16) a block, all zeros."""
    sizes = Sizes(dim=2048, ffn_dim=8192, num_layers=num_layers, in_channels=16)
    tensors = {}
    for name, shape in wan_shapes(sizes).items():
        module = name.removesuffix(".weight")
        if quantized and module != name and module.endswith(BLOCK_LINEARS):
            tensors[f"{module}.int8_weight"] = torch.zeros(shape, dtype=torch.int8)
            tensors[f"{module}.scale"] = torch.ones(shape[0] // 128, shape[1] // 128)
        else:
            norm = "norm" in name
            tensors[name] = torch.zeros(shape, dtype=torch.float32 if norm else torch.bfloat16)
    for index in range(num_layers):
        tensors[f"blocks.{index}.{PROJ_L}.weight"] = torch.zeros(128, 128)
        tensors[f"blocks.{index}.{PROJ_L}.bias"] = torch.zeros(128)
    tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"].flatten(1)
    return tensors
