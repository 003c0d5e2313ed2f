"""The one log line of a run."""

import contextlib
import logging

import pytest
import torch
from turbodiffusion_pack.kernels.norm import rms_norm
from turbodiffusion_pack.turbo_core import run_report

ROW = torch.ones(4)


def test_the_line_tells_what_ran(caplog):
    with caplog.at_level(logging.INFO), run_report.run():
        for _ in range(2):
            run_report.note_forward(num_blocks=5)
            for block in range(4):
                run_report.note_sla(block, "sla top-k 0.1")
                run_report.note_int8("blocks", block)
                rms_norm(ROW, ROW, backend="reference")
            run_report.note_dense(4, "asked for")
    (line,) = caplog.messages
    assert line.startswith("TurboDiffusion: 2 forward passes; SLA in 4 of 5 blocks; ")
    assert "sla top-k 0.1 in blocks 0-3" in line
    assert "dense in block 4: asked for" in line
    assert "INT8 exact (128x128 blocks)" in line and "in 4 linears" in line
    assert line.endswith("; kernels: torch reference, as it was asked for")


def test_kernels_are_told_once_and_what_they_declined():
    counts = run_report.Counts()
    counts.forwards = 1
    counts.kernels = {
        ("rms_norm", "Triton", None),
        ("int8_linear", "CUDA", None),
        ("prepare", "CUDA", None),
    }
    assert counts.text().endswith("; kernels: CUDA and Triton")
    counts.kernels |= {
        ("int8_linear", "Triton", "the output is float32"),
        ("apply_rope", "torch reference", "the head dim 96 is not a power of two"),
    }
    assert counts.text().endswith(
        "; kernels: CUDA and Triton and torch reference, as the head dim 96 is not a power of two"
        "; int8_linear in Triton: the output is float32"
    )


@pytest.mark.parametrize(
    ("error", "ending"), [(InterruptedError, "cancelled"), (MemoryError, "ended by an error")]
)
def test_a_run_that_does_not_end_by_itself_says_so(caplog, error, ending):
    caplog.set_level(logging.INFO)
    outer, inner = run_report.run(InterruptedError), run_report.run()
    with contextlib.suppress(error), outer, inner:
        run_report.note_forward(num_blocks=2)
        run_report.note_dense(1, "asked for")
        run_report.note_int8("rows", 0)
        raise error
    (line,) = caplog.messages
    assert line == (
        f"TurboDiffusion: {ending}, 1 forward pass; SLA in 0 of 2 blocks; dense in block 1: asked "
        "for; INT8 fast (per token and channel) in 1 linear"
    )


def test_nothing_is_told_outside_a_run(caplog):
    with caplog.at_level(logging.INFO):
        run_report.note_forward(num_blocks=2)
        with run_report.run():
            pass
    assert not caplog.messages


def test_two_experts_are_told_apart(caplog):
    with caplog.at_level(logging.INFO), run_report.run():
        for expert in ("high", "high", "low"):
            run_report.note_expert(expert)
            run_report.note_forward(num_blocks=2)
            run_report.note_sla(0, f"sla of {expert}")
            rms_norm(ROW, ROW, backend="reference" if expert == "low" else "auto")
    (line,) = caplog.messages
    high, low = line.removeprefix("TurboDiffusion: ").split(" | ")
    assert high.startswith("high: 2 forward passes; SLA in 1 of 2 blocks; sla of high in block 0;")
    assert low.startswith("low: 1 forward pass; SLA in 1 of 2 blocks; sla of low in block 0;")
    assert low.endswith("asked for") and "asked for" not in high


def test_an_expert_without_anything_of_ours(caplog):
    with caplog.at_level(logging.INFO):
        with run_report.run():
            run_report.note_expert("high")
        assert not caplog.messages
        with run_report.run():
            run_report.note_expert("high")
            run_report.note_expert("low")
            run_report.note_forward(num_blocks=2)
    (line,) = caplog.messages
    assert line.startswith("TurboDiffusion: high: runs without TurboDiffusion | low: 1 forward")


def test_a_run_within_a_run_is_one_run(caplog):
    with caplog.at_level(logging.INFO), run_report.run():
        run_report.note_forward(num_blocks=2)
        with run_report.run():
            run_report.note_forward(num_blocks=2)
        assert not caplog.messages
    (line,) = caplog.messages
    assert line.startswith("TurboDiffusion: 2 forward passes")
