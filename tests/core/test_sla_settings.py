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
        ("2-1", ()),
    ],
)
def test_blocks(text, blocks):
    assert parse_blocks(text, 5) == blocks


@pytest.mark.parametrize("text", ["a", "1-", "-2", "1;2", "1.5"])
def test_blocks_that_are_not_numbers(text):
    with pytest.raises(ValueError, match="numbers and ranges"):
        parse_blocks(text, 40)


def test_blocks_the_model_does_not_have():
    with pytest.raises(ValueError, match="block 30, but this model has blocks 0 to 29"):
        parse_blocks("28-31", 30)


@pytest.mark.parametrize("topk", [0, -0.1, 1.01, float("nan")])
def test_topk_is_a_share(topk):
    with pytest.raises(ValueError, match="topk must be above 0 and at most 1"):
        SLASettings(topk=topk)


def test_unknown_attention():
    with pytest.raises(ValueError, match="attention must be one of"):
        SLASettings(attention="flash")
