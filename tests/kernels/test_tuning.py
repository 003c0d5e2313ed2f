"""Cards that the tuning tables do not name take the row of the card before them."""

import pytest
from ahead_of_time import CARDS
from turbodiffusion_pack.kernels.tuning import (
    INT8_LINEAR,
    RowLoop,
    WholeRow,
    attention_launch,
    of_card,
    of_width,
)


@pytest.mark.parametrize(
    ("card", "row"),
    [
        ((0, 0), (8, 0)),  # no card at all: the interpreter
        ((8, 0), (8, 0)),
        ((8, 7), (8, 6)),
        ((9, 0), (9, 0)),
        ((10, 3), (10, 0)),
        ((12, 1), (12, 0)),
    ],
)
def test_row_of_card(card, row):
    assert of_card({name: name for name in CARDS}, card) == row


@pytest.mark.parametrize(
    ("card", "row"), [((8, 7), (8, 6)), ((8, 9), (8, 6)), ((10, 3), (10, 0)), ((12, 1), (12, 0))]
)
def test_attention_on_a_card_that_is_not_named_runs_like_on_the_one_before(card, row):
    for values in ("16 bit", "fp16"):
        for shape in ((128, 64), (64, 64), (64, 128)):
            launch = attention_launch(card, values, *shape)
            assert launch == attention_launch(row, values, *shape)
            assert launch["num_stages"] >= 2 and launch["num_warps"] in (4, 8)


def test_large_shared_memory_holds_more_key_blocks():
    stages = {
        card: [attention_launch(card, v, 128, 64)["num_stages"] for v in ("16 bit", "fp16")]
        for card in CARDS
    }
    large = {(8, 0): [3, 4], (9, 0): [3, 3], (10, 0): [3, 4]}
    assert stages == {card: large.get(card, [2, 3]) for card in CARDS}


@pytest.mark.parametrize("card", CARDS)
def test_cards_with_tma_have_tiles_for_it(card):
    tiles = of_card(INT8_LINEAR, card)
    assert "pointers" in tiles
    assert {"rows", "blocks"} <= tiles.keys() or card < (9, 0)


@pytest.mark.parametrize(("width", "row"), [(8, 64), (64, 64), (65, 1024), (5000, 1024)])
def test_row_of_width(width, row):
    assert of_width({64: 64, 1024: 1024}, width) == row


@pytest.mark.parametrize(
    ("warps", "programs", "registers"), [(1, 12, 168), (4, 3, 168), (8, 4, 64), (4, 1, 255)]
)
def test_programs_of_a_row_loop_fit_the_registers(warps, programs, registers):
    assert RowLoop(warps, stages=2, programs=programs).launch()["maxnreg"] == registers
    assert registers * 32 * warps * programs <= 65536


@pytest.mark.parametrize(("width", "warps"), [(64, 2), (4096, 4), (8192, 8), (2**17, 16)])
def test_warps_of_a_whole_row(width, warps):
    assert WholeRow(values=32, fewest_warps=2, most_warps=16).warps(width) == warps
