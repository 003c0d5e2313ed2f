"""Weights that a new Wan transformer starts its training with."""

import torch

from ..checkpoint.sizes import TEXT_DIM, Sizes, wan_shapes

ZERO = ("head.head.weight",)  # the velocity starts at 0


def initial_weights(
    sizes: Sizes, seed: int, text_channels: int = TEXT_DIM
) -> dict[str, torch.Tensor]:
    """Random fp32 weights under Wan's names, the same for one seed on every machine.

    Args:
        sizes: of the transformer.
        seed: of all weights.
        text_channels: how many of the 4096 text channels are ever unlike 0; the weights of the
            others are 0, and get no gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in wan_shapes(sizes).items():
        tensors[name] = _initial(name, shape, generator)
    weight = tensors["text_embedding.0.weight"]
    weight.normal_(std=text_channels**-0.5, generator=generator)[:, text_channels:] = 0
    return tensors


def _initial(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    tensor = torch.zeros(shape)
    if name.endswith("modulation"):
        return tensor.normal_(std=shape[-1] ** -0.5, generator=generator)
    if ".norm" in name and name.endswith("weight"):
        return tensor.fill_(1)
    if name.endswith("bias") or name in ZERO:
        return tensor
    inputs = tensor[0].numel()
    if name.startswith(("text_embedding", "time_embedding")):
        return tensor.normal_(std=inputs**-0.5, generator=generator)
    bound = (6 / (shape[0] + inputs)) ** 0.5  # Glorot's
    return tensor.uniform_(-bound, bound, generator=generator)
