"""How a step's batch is split: into slots of a micro-batch each, dealt to the processes."""

from collections.abc import Callable

import torch

from .error import TrainingError
from .processes import count, rank

Values = dict[str, torch.Tensor]


def own_slots(batch: int, micro_batch: int) -> range:
    """The numbers of this process's slots.

    Raises:
        TrainingError: the batch cannot be dealt out evenly.
    """
    if batch % (micro_batch * count()):
        raise TrainingError(
            f"a batch of {batch} cannot be dealt to {count()} processes in micro-batches of "
            f"{micro_batch}: choose another --set batch=... or --set micro_batch=...",
            everywhere=True,
        )
    return range(rank(), batch // micro_batch, count())


def accumulated(slots: range, learn: Callable[[int, float], Values]) -> Values:
    """Gradients of the mean loss over the slots, and the means of what each tells.

    Args:
        learn: of a slot's number and its share in the mean adds that share of the slot's gradients
            to the weights', and tells. FSDP2 averages over the processes.
    """
    told = [learn(slot, 1 / len(slots)) for slot in slots]
    return {name: torch.stack([values[name] for values in told]).mean() for name in told[0]}
