"""How many bytes of weights come to the GPU in a run, and how long it waits for them."""

import torch

from .. import run_report


class waiting:  # noqa: N801 - read as a function
    """A context around what makes the GPU's stream wait for weights; `size` bytes come, 0 if none.

    The report gets the bytes, and the time by the GPU's own clock.
    """

    __slots__ = ("device", "size", "start")

    def __init__(self, device: torch.device):
        self.device, self.size = device, 0

    def __enter__(self) -> "waiting":
        self.start = _now(self.device)
        return self

    def __exit__(self, *_) -> None:
        if self.size:
            run_report.note_streamed(self.size, self.start, _now(self.device))


def _now(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def is_away(op: torch.nn.Module, device: torch.device) -> bool:
    """Whether the host may have to bring the weight of a comfy op to `device` for its next use."""
    return op.weight.device != device and "_prefetch" not in vars(op)


def came(op: torch.nn.Module, signature: object) -> bool:
    """Whether it did, given what `signature_of` said before; without dynamic VRAM it always does.

    The host notes another signature where it brings a weight, and none where it has no room.
    """
    return not hasattr(op, "_v") or op._v_signature is None or op._v_signature is not signature


def signature_of(op: torch.nn.Module) -> object:
    """What the host knows a weight on the GPU by."""
    return vars(op).get("_v_signature")


def bytes_of(op: torch.nn.Module) -> int:
    """The size of a comfy op's weight, as it is kept, and bias."""
    return sum(tensor.nbytes for tensor in (op.weight, op.bias) if tensor is not None)
