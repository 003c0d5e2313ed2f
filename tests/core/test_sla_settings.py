"""What a user may choose for the attention, and what is refused."""

import pytest
from turbodiffusion_pack.turbo_core.sla_settings import SLASettings, parse_blocks


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("", ()),
        (" ", ()),
        ("3", (3,)),
        ("0, 2-4", (0, 2, 3, 4)),
        ("4,4, 3 - 4", (3, 4)),
        ("007", (7,)),
        ("0\n,\t1 ,,", (0, 1)),
    ],
)
def test_blocks(text, blocks):
    assert parse_blocks(text, 8) == blocks


ODD = ["a", "1-", "-2", "1;2", "1.5", "1 2", "0--1", "1-2-3", "+1", "1_0", "0x1", "nan"]
NOT_ASCII = ["\u0663", "\u00b2", "0\u20134"]


@pytest.mark.parametrize("text", [*ODD, *NOT_ASCII, "9" * 5000], ids=lambda text: text[:9])
def test_blocks_that_are_not_numbers(text):
    with pytest.raises(ValueError, match="numbers and ranges such as '0, 2-4', got") as caught:
        parse_blocks(text, 40)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("text", [None, 3, 1.5, ["0"], b"0"])
def test_blocks_that_are_no_text(text):
    with pytest.raises(ValueError, match="dense blocks are text such as '0, 2-4', got"):
        parse_blocks(text, 40)


@pytest.mark.parametrize("text", ["1-0", "39 - 2", "0, 30-29"])
def test_a_range_that_runs_backwards(text):
    with pytest.raises(ValueError, match=r"which runs backwards. Write '\d+-\d+'"):
        parse_blocks(text, 40)


def test_blocks_the_model_does_not_have():
    with pytest.raises(ValueError, match="block 30, but this model has blocks 0 to 29"):
        parse_blocks("28-31", 30)


@pytest.mark.parametrize("topk", [0, -0.1, 1.01, float("nan"), "0.1", None, 1j])
def test_topk_is_a_share(topk):
    with pytest.raises(ValueError, match="topk must be above 0 and at most 1"):
        SLASettings(topk=topk)


@pytest.mark.parametrize("steps", [-1, 0.5, float("nan"), "1", None])
def test_dense_steps_are_a_count(steps):
    with pytest.raises(ValueError, match="dense_steps must be a number from 0 up, got"):
        SLASettings(dense_steps=steps)


def test_unknown_choices():
    with pytest.raises(ValueError, match="attention must be one of"):
        SLASettings(attention="flash")
    with pytest.raises(ValueError, match="backend 'cuda' is unknown, use one of auto"):
        SLASettings("dense", backend="cuda")
