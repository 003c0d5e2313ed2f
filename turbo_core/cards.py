"""What is published of cards that people own, for estimates: nobody has measured them here."""

from typing import NamedTuple

from ..kernels.ceilings import FP8, FP8_SHORT, FP16, FP16_SHORT, INT8


class Card(NamedTuple):
    """A graphics card as its maker describes it."""

    name: str  # as people say it
    torch_name: str  # as torch tells it
    capability: tuple[int, int]
    multiprocessors: int
    # The clock that it holds at its power limit by the maker's word, and the one it aims at, MHz.
    base_mhz: int
    boost_mhz: int
    watts: int
    tops: dict[str, float]  # dense products at the boost clock, 10^12 operations a second
    gbs: float  # of its memory

    def lasting(self) -> float:
        """The clock that it holds at its power limit, in parts of its boost clock."""
        return self.base_mhz / self.boost_mhz


# GeForce cards run fp16 and fp8 products with fp32 sums at half the rate of those with fp16 sums.
CARDS = (
    # NVIDIA Ampere GA102 GPU architecture, whitepaper V2, appendix A, table 9 (RTX 3090).
    Card(
        "RTX 3090", "NVIDIA GeForce RTX 3090", (8, 6), 82, 1395, 1695, 350,
        {INT8: 285, FP16: 71, FP16_SHORT: 142}, 936,
    ),
    # NVIDIA Ada GPU architecture, whitepaper V2.1, appendix A, table 2 (RTX 4090); its base clock
    # from the card's product page.
    Card(
        "RTX 4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 2235, 2520, 450,
        {INT8: 660.6, FP16: 165.2, FP16_SHORT: 330.3, FP8: 330.3, FP8_SHORT: 660.6}, 1008,
    ),
    # NVIDIA RTX Blackwell GPU architecture, whitepaper V1.1, appendix A (RTX 5090); its base clock
    # from the card's product page.
    Card(
        "RTX 5090", "NVIDIA GeForce RTX 5090", (12, 0), 170, 2017, 2407, 575,
        {INT8: 838, FP16: 209.5, FP16_SHORT: 419, FP8: 419, FP8_SHORT: 838}, 1792,
    ),
    # NVIDIA A100 80GB datasheet (SXM) and A100 GPU architecture, whitepaper V1.0, table 1; its base
    # clock from TechPowerUp's GPU database.
    Card(
        "A100", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 1275, 1410, 400,
        {INT8: 624, FP16: 312, FP16_SHORT: 312}, 2039,
    ),
)  # fmt: skip


def named(torch_name: str) -> Card | None:
    """The card that torch calls so; None of one that is not listed."""
    return next((card for card in CARDS if card.torch_name == torch_name), None)
