"""The one log line of a run."""

import logging

from turbodiffusion_pack.turbo_core import run_report


def test_the_line_tells_what_ran(caplog):
    with caplog.at_level(logging.INFO), run_report.run():
        for _ in range(2):
            run_report.note_forward(num_blocks=5)
            for block in range(4):
                run_report.note_sla(block, "sla top-k 0.1", "Triton")
                run_report.note_int8("blocks", block, "Triton")
            run_report.note_dense(4, "asked for")
    (line,) = caplog.messages
    assert line.startswith("TurboDiffusion: 2 forward passes; SLA in 4 of 5 blocks; ")
    assert "sla top-k 0.1 in blocks 0-3" in line
    assert "dense in blocks 4: asked for" in line
    assert "INT8 exact (128x128 blocks)" in line and "in 4 linears" in line
    assert line.endswith("kernels: Triton")


def test_every_language_of_the_kernels_is_told_once(caplog):
    with caplog.at_level(logging.INFO), run_report.run():
        run_report.note_forward(num_blocks=2)
        for block in range(2):
            run_report.note_sla(block, "sagesla top-k 0.1", "Triton", "CUDA")
            run_report.note_int8("rows", block, "Triton")
    (line,) = caplog.messages
    assert line.endswith("; kernels: CUDA and Triton")


def test_a_cancelled_run_is_told_too(caplog):
    with caplog.at_level(logging.INFO):
        try:
            with run_report.run():
                run_report.note_forward(num_blocks=2)
                raise InterruptedError
        except InterruptedError:
            pass
    assert "1 forward passes; SLA in 0 of 2 blocks" in caplog.text


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
            run_report.note_sla(0, f"sla of {expert}", "Triton")
    (line,) = caplog.messages
    high, low = line.removeprefix("TurboDiffusion: ").split(" | ")
    assert high.startswith("high: 2 forward passes; SLA in 1 of 2 blocks; sla of high in blocks 0;")
    assert low.startswith("low: 1 forward passes; SLA in 1 of 2 blocks; sla of low in blocks 0;")


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
