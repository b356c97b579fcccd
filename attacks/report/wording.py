"""How a report writes numbers: as many digits as they deserve, and never on the flattering side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal

ABSENT = "–"

# Digits beyond these are rounding errors of the arithmetic and must not decide a directed rounding.
TRUSTED_DIGITS = 9

MINUTE, HOUR = 60.0, 3600.0


def area(value: float) -> str:
    """An AUC: three digits, and never a certainty that it is not."""
    return ">0.999" if 0.9995 <= value < 1 else f"{value:.3f}"


def percent(share: float) -> str:
    """A share in per cent without the sign: one digit, or one significant digit if it is tiny."""
    if 0 < share < 0.0005:
        return significant(100 * share, 1)
    return ">99.9" if 0.9995 <= share < 1 else f"{100 * share:.1f}"


def percentage(share: float) -> str:
    """A share in per cent with the sign, which never goes to the next line alone."""
    return f"{percent(share)}\u00a0%"


def level(confidence: float) -> str:
    """A level somebody chose, such as 95 % confidence or 1 % FPR, with the digits it has."""
    return f"{significant(100 * confidence, 4)}\u00a0%"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, with its sign."""
    text = f"{100 * difference:+.1f}".replace("-", "\u2212")
    return f"{'0.0' if text[1:] == '0.0' else text} points"


def budget(epsilon: float) -> str:
    """An accounted ε: three significant digits, rounded up."""
    return _rounded(epsilon, 3, ROUND_CEILING)


def bound(epsilon: float) -> str:
    """A lower bound on ε: three significant digits, rounded down."""
    return _rounded(epsilon, 3, ROUND_FLOOR)


def significant(value: float, digits: int = 3) -> str:
    """So many significant digits, without exponent."""
    return _rounded(value, digits, ROUND_HALF_EVEN)


def small(value: float) -> str:
    """A δ: two significant digits, 1e-5 rather than 1e-05."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"


def count(number: float) -> str:
    """A number of things, with commas."""
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, three significant digits."""
    for unit, name in ((HOUR, "h"), (MINUTE, "min")):
        if seconds >= 2 * unit:
            return f"{significant(seconds / unit)}\u00a0{name}"
    return f"{significant(seconds)}\u00a0s"


def interval(limits: Sequence[float], write: Callable[[float], str]) -> str:
    """Two limits in brackets."""
    return f"[{write(limits[0])},\u00a0{write(limits[1])}]"


def _rounded(value: float, digits: int, rounding: str) -> str:
    """So many significant digits in that direction, trailing zeros dropped."""
    if value == 0:
        return "0"
    exact = _quantized(Decimal(repr(float(value))), TRUSTED_DIGITS, ROUND_HALF_EVEN)
    return format(_quantized(exact, digits, rounding).normalize(), "f")


def _quantized(number: Decimal, digits: int, rounding: str) -> Decimal:
    """The number with so many significant digits."""
    return number.quantize(Decimal(1).scaleb(number.adjusted() - digits + 1), rounding=rounding)
