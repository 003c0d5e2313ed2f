"""What every launch asks first."""

import contextlib
import types

import pytest
import torch
from turbodiffusion_pack.kernels import dispatch

CPU = torch.zeros(1)


@pytest.mark.parametrize(("of_x", "switches"), [(0, False), (1, True)])
def test_a_launch_switches_devices_only_where_it_has_to(monkeypatch, of_x, switches):
    x = types.SimpleNamespace(is_cuda=True, get_device=lambda: of_x)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert isinstance(dispatch.launching_on(x), torch.cuda.device_of) == switches
    assert isinstance(dispatch.launching_on(CPU), contextlib.nullcontext)


@pytest.mark.parametrize(
    ("backend", "unavailable", "unsupported", "reason"),
    [
        ("auto", None, (), None),
        ("triton", None, (None,), None),
        ("auto", "no GPU", (), "no GPU"),
        ("triton", "no GPU", (None, "odd strides"), "no GPU; odd strides"),
        ("triton", None, ("odd strides", "float32"), "odd strides; float32"),
        ("reference", "no GPU", ("odd strides",), "it was asked for"),
    ],
)
@pytest.mark.parametrize("interpreting", [False, True])
def test_reasons(monkeypatch, backend, unavailable, unsupported, reason, interpreting):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda device: unavailable)
    monkeypatch.setattr(dispatch, "interpreting", lambda: interpreting)
    if backend == "auto" and reason is None and interpreting:
        reason = "Triton only interprets here"
    assert dispatch.reference_reason(backend, CPU, *unsupported) == reason
