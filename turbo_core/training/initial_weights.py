"""Weights that a new Wan transformer starts its training with."""

import torch

from ..checkpoint.sizes import FREQ_DIM, TEXT_DIM, Sizes, wan_shapes
from .gradients import own

ZERO = ("head.head.weight",)  # the velocity starts at 0
TIME_WEIGHT = "time_embedding.0.weight"
MOST_TURNS = 4


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
    tensors[TIME_WEIGHT][:, fast_time_features()] = 0
    weight = tensors["text_embedding.0.weight"]
    weight.normal_(std=text_channels**-0.5, generator=generator)[:, text_channels:] = 0
    return tensors


def fast_time_features() -> torch.Tensor:
    """bool [256]: which of Wan's time features turn more than four times over all noise levels.

    They are cos and sin of 10000^(-i / 128) t, with t up to 1000. A teacher that has learnt to use
    the fast ones from few samples is rough in time, and the tangent that rCM takes of its student
    is mostly that roughness: 20 times too large on the toy. Wan has learnt from enough of them.
    """
    rates = 10000 ** (-torch.arange(FREQ_DIM // 2) / (FREQ_DIM // 2))
    return (1000 * rates > MOST_TURNS * 2 * torch.pi).repeat(2)


def still_time_features(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights that are not to learn, as Learner takes them: those of fast time features that the
    network makes no use of, which are a toy's, in its teacher and in what starts as its teacher.

    Free, they learn faster than the slow ones and make a student's tangent grow all the while.
    """
    weight = own(network.get_parameter(TIME_WEIGHT).detach())
    still = fast_time_features().to(weight.device) & (weight == 0).all(0)
    return {TIME_WEIGHT: still} if still.any() else {}


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
