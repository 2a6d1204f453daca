"""Numbers as text, for people."""

from __future__ import annotations


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign, a true minus, and no sign where it rounds to zero: "+0.032", "−0.117", "0.000"."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if text.strip("+-0.") else text[1:]


def bound(value: float) -> str:
    """A limit of an interval: `signed`, with digits enough to show on which side of zero it lies."""
    digits = 3
    while value and abs(value) < 1 and not round(abs(value), digits) and digits < 9:
        digits += 1
    return signed(value, digits)


def format_p(p: float, level: float = 0.05) -> str:
    """ "= 0.034", "= 0.21" or "< 0.001", with digits enough to show on which side of `level` it lies."""
    if p < 0.001 <= level:
        return "< 0.001"
    digits = 3 if p < 0.1 else 2
    while (round(p, digits) < level) != (p < level) and digits < 9:
        digits += 1
    return f"= {p:.{digits}f}"


def plural(number: int, noun: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
