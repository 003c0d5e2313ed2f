"""Numbers in sentences."""


def count(number: int, one: str, more: str = "") -> str:
    """1 -> "1 linear", 2 -> "2 linears"; `more` is the plural where no s makes it."""
    return f"{number} {one if number == 1 else more or one + 's'}"
