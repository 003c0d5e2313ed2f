"""What every launch asks first."""

import contextlib
import threading
import types

import fresh_process
import pytest
import torch
import without_triton
from turbodiffusion_pack.kernels import dispatch
from turbodiffusion_pack.kernels.norm import rms_norm

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
        ("auto", "no GPU", (None, "odd strides"), "no GPU; odd strides"),
        ("auto", None, ("odd strides", "float32"), "odd strides; float32"),
        ("reference", "no GPU", ("odd strides",), "it was asked for"),
    ],
)
@pytest.mark.parametrize("interpreting", [False, True])
def test_reasons(monkeypatch, backend, unavailable, unsupported, reason, interpreting):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda device: unavailable)
    monkeypatch.setattr(dispatch, "interpreting", lambda: interpreting)
    if backend == "auto" and reason is None and interpreting:
        reason = "Triton only interprets here"
    assert dispatch.why_reference("an op", backend, CPU, *unsupported) == reason


def test_triton_by_name_says_why_not(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda device: "no GPU")
    message = "an op: Triton was asked for, but no GPU; odd strides. Use 'auto'."
    with pytest.raises(RuntimeError, match=message):
        dispatch.why_reference("an op", "triton", CPU, None, "odd strides")
    with pytest.raises(ValueError, match="an op: backend 'cuda' is unknown, use one of auto, tri"):
        dispatch.why_reference("an op", "cuda", CPU)


def test_all_ops_run_where_triton_is_not_installed():
    assert fresh_process.call(without_triton.failures) == {}


def test_listeners_hear_what_runs_in_their_context():
    told = []

    def hear(*choice):
        told.append(choice)

    with dispatch.listening(hear):
        rms_norm(CPU, CPU, backend="reference")
        threading.Thread(target=rms_norm, args=(CPU, CPU)).start()
    rms_norm(CPU, CPU)
    assert told == [("rms_norm", dispatch.REFERENCE, "it was asked for")]


def test_compiled_graphs_are_whole_and_tell_nothing():
    told = []
    compiled = torch.compile(rms_norm, backend="eager", fullgraph=True)
    with dispatch.listening(lambda *choice: told.append(choice)):
        y = compiled(CPU, CPU, backend="reference")
    assert torch.equal(y, rms_norm(CPU, CPU, backend="reference"))
    assert told == []
