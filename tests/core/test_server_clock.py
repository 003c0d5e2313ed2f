"""How tests/benchmarks/whole_clock.py makes a video's parts of what the server told."""

import pytest
import server_clock
from clock_workflows import node
from server_clock import Part

SAMPLER = node("SamplerCustomAdvanced")
PROMPT = {"load": node("TurboLoader"), "sampler": SAMPLER, "images": node("VAEDecode")}
STOCK = {"high": node("KSamplerAdvanced"), "low": node("KSamplerAdvanced"), **PROMPT}


def told(*readings):
    """Each (node, value, max, seconds, loading, peak)."""
    names = "node", "value", "max", "seconds", "loading", "peak"
    events = ["executing" if not value else "progress" for _, value, *_ in readings]
    return [
        {"event": event, **dict(zip(names, reading, strict=True))}
        for event, reading in zip(events, readings, strict=True)
    ]


def seconds(parts):
    return {name: pytest.approx(part.seconds) for name, part in parts.items()}


def test_parts_of_a_video_sum_up_to_the_whole():
    run = told(
        (None, 0, 0, 0.0, 0.0, 0),
        ("load", 0, 0, 0.5, 0.0, 0),
        ("load", 7, 7, 1.0, 0.0, 10),
        ("sampler", 0, 0, 2.5, 0.0, 10),
        ("sampler", 1, 3, 5.0, 1.0, 90),
        ("sampler", 2, 3, 6.0, 1.0, 80),
        ("sampler", 3, 3, 7.5, 1.25, 70),
        ("images", 0, 0, 7.6, 1.25, 50),
        ("images", 1, 2, 8.0, 1.35, 60),
        (None, 0, 0, 9.6, 1.35, 55),
    )
    parts = server_clock.parts(run, PROMPT)
    assert seconds(parts) == {
        "rest": 0.5,
        "load": 2.0,
        "step 1": 1.5,
        "to the GPU": 1.1,
        "step 2": 1.0,
        "step 3": 1.25,
        "switch": 0.25,
        "after the steps": 0.1,
        "decode": 1.9,
        "start to latents": 5.1,
        "start to pixels": 7.1,
        "whole": 9.6,
    }
    peaks = {name: parts[name].peak for name in ("load", "step 1", "step 2", "decode")}
    assert peaks == {"load": 10, "step 1": 90, "step 2": 80, "decode": 60}


def test_steps_of_two_samplers_count_on():
    run = told(
        ("high", 0, 0, 0.0, 0.0, 0),
        ("high", 1, 2, 1.0, 0.0, 0),
        ("high", 2, 2, 2.0, 0.0, 0),
        ("low", 0, 0, 2.1, 0.0, 0),
        ("low", 1, 2, 5.1, 2.0, 0),
        ("low", 2, 2, 6.1, 2.0, 0),
        ("images", 0, 0, 6.2, 2.0, 0),
        (None, 0, 0, 7.0, 2.0, 0),
    )
    found = seconds(server_clock.parts(run, STOCK))
    assert {name: found[name] for name in ("step 2", "step 3", "step 4", "switch")} == {
        "step 2": 1.0,
        "step 3": 1.0,
        "step 4": 1.0,
        "switch": 2.0,
    }
    assert found["after the steps"] == 0.2
    assert (found["start to latents"], found["start to pixels"]) == (6.2, 7.0)


def test_parts_one_after_the_other_take_the_most_of_both():
    both = Part(1.0, 5, 1, 1, 1, 1, 1).joined(Part(2.0, 3, 2, 1, 1, 1, 1))
    assert both == Part(3.0, 5, 2, 1, 1, 1, 1)
