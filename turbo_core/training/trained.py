"""A network with its optimizer, as torch.distributed.checkpoint saves and loads them."""

from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer


class Trained:
    """Both states under parameter names, sharded by FSDP2 or not; part of what save takes."""

    def __init__(self, network: nn.Module, optimizer: Optimizer):
        self.network, self.optimizer = network, optimizer

    def state_dict(self) -> dict:
        """{"network": ..., "optimizer": ...}; loading is in place, so all of it exists."""
        network, optimizer = get_state_dict(self.network, self.optimizer)
        return {"network": network, "optimizer": optimizer}

    def load_state_dict(self, state: dict) -> None:
        """Take over what state_dict gave."""
        set_state_dict(
            self.network,
            self.optimizer,
            model_state_dict=state["network"],
            optim_state_dict=state["optimizer"],
        )
