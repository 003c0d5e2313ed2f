"""A network split over the processes of a run by FSDP2."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from .processes import count


def shard(network: torch.nn.Module, device: torch.device) -> None:
    """Split every block's parameters, then the rest's, over all processes.

    Parameters are gathered in fp32, as autocast rounds products and nothing else, and gradients are
    reduced in fp32.
    """
    mesh = init_device_mesh(device.type, (count(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in network.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)
