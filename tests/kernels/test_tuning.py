"""Cards that the tuning tables do not name take the row of the card before them."""

import pytest
from ahead_of_time import CARDS
from turbodiffusion_pack.kernels.tuning import (
    GradientLoop,
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


def test_attention_on_a_card_that_is_not_named_runs_like_on_the_one_before():
    launches = {
        card: [attention_launch(card, v, 128, 64) for v in ("16 bit", "fp16")]
        for card in ((10, 0), (10, 3), (12, 0))
    }
    assert launches[10, 3] == launches[10, 0] != launches[12, 0]


@pytest.mark.parametrize(("width", "row"), [(8, 64), (64, 64), (65, 1024), (5000, 1024)])
def test_row_of_width(width, row):
    assert of_width({64: 64, 1024: 1024}, width) == row


@pytest.mark.parametrize(
    ("warps", "programs", "registers"), [(1, 12, 168), (4, 3, 168), (8, 4, 64), (4, 1, 255)]
)
def test_programs_of_a_row_loop_fit_the_registers(warps, programs, registers):
    assert RowLoop(warps, stages=2, programs=programs).launch()["maxnreg"] == registers


@pytest.mark.parametrize(("width", "warps"), [(64, 2), (4096, 4), (8192, 8), (2**17, 16)])
def test_warps_of_a_whole_row(width, warps):
    assert WholeRow(values=32, fewest_warps=2, most_warps=16).warps(width) == warps


@pytest.mark.parametrize(
    ("block", "other", "expected"), [(128, 64, (128, 64, 8)), (64, 128, (64, 64, 4))]
)
def test_a_program_of_fewer_rows_has_fewer_warps(block, other, expected):
    launch = GradientLoop(128, 64, warps=8, stages=3).launch(block, other)
    assert (launch["ROWS"], launch["STEP"], launch["num_warps"]) == expected
    assert launch["num_stages"] == 3
