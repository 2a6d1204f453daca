"""Numbers and words for readers: a true minus, signs, enough digits, plurals."""

from __future__ import annotations

import math
import os
import sys

_COLOURS = {"red": 31, "green": 32, "yellow": 33}
"""Of ANSI terminals."""


def format_number(value: float | None, form: str) -> str:
    """A number in a format such as ".3f"; with "+.3f" it is `signed`. Empty for None and NaN.

    A large number has all its digits instead of an exponent: 462 in ".2g".
    """
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if form.startswith("+"):
        return signed(value, int(form[2]))
    text = format(value, form)
    return (f"{value:.0f}" if "e+" in text else text).replace("-", "−")


def format_spread(mean: float, sd: float, form: str) -> str:
    """ "0.612 ± 0.208", in the format of `format_number`; the mean alone if there is no sd."""
    shown_sd = format_number(sd, form.removeprefix("+"))
    return format_number(mean, form) + (f" ± {shown_sd}" if shown_sd else "")


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign, a true minus, and no sign if it rounds to zero: "+0.032", "−0.117", "0.000"."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if text.strip("+-0.") else text[1:]


def bound(value: float) -> str:
    """A limit of an interval: `signed`, with enough digits to show on which side of zero it is."""
    digits = 3
    while value and abs(value) < 1 and not round(abs(value), digits) and digits < 9:
        digits += 1
    return signed(value, digits)


def format_p(p: float, level: float = 0.05) -> str:
    """ "= 0.034", "= 0.21" or "< 0.001", with enough digits to show on which side of `level` it is."""
    if p < 0.001 <= level:
        return "< 0.001"
    digits = 3 if p < 0.1 else 2
    while (round(p, digits) < level) != (p < level) and digits < 9:
        digits += 1
    return f"= {p:.{digits}f}"


def plural(number: int, noun: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def format_hours(hours: float) -> str:
    """A duration for readers: "24 min", "3.1 h", "120 h"."""
    return f"{max(1, round(60 * hours))} min" if hours < 1 else f"{hours:.1f} h" if hours < 10 else f"{hours:.0f} h"


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, e.g. "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def format_span(seconds: float) -> str:
    """A time as a person says it: "12 s", "5.2 min", "25 min", "3.1 h", "2.5 days"."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < limit * size:
            value = seconds / size
            return f"{value:.1f} {unit}" if size > 1 and value < 9.95 else f"{value:.0f} {unit}"
    return f"{seconds / 86_400:.1f} days"


def styled(text: str, colour: str) -> str:
    """Text in a colour (red, green, yellow) where standard output is a terminal, and nobody has set NO_COLOR."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"
