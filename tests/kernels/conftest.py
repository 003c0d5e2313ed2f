"""Fresh memory is poisoned: an output element that a kernel leaves unwritten fails its test."""

import pytest
import torch

POISON = 0xFF  # NaN in every float format, -1 in every integer


def _poisoned(allocate):
    def allocate_poisoned(*args, **kwargs):
        out = allocate(*args, **kwargs)
        out.untyped_storage().fill_(POISON)
        return out

    return allocate_poisoned


@pytest.fixture(autouse=True)
def poison_fresh_memory(monkeypatch):
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
