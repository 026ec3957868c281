"""How numbers are written, in tables and on axes. NaN, a number not known, is an em dash."""

from __future__ import annotations

import math
from collections.abc import Sequence


def format_number(value: float, sd: float = math.nan, digits: int | None = None) -> str:
    """A plain number with sensible digits, "± sd" where there is one."""
    if not math.isfinite(value):
        return "—"
    if digits is None:
        digits = 0 if abs(value) >= 999.5 else 1 if abs(value) >= 99.95 else 2
    text = f"{value:,.{digits}f}".replace("-", "−")
    return f"{text} ± {sd:,.{digits}f}" if math.isfinite(sd) else text


def format_scaled(
    value: float, sd: float = math.nan, units: Sequence[str] = ("", "k", "M", "B")
) -> str:
    """Three digits and a unit, each a thousand of the one before."""
    if not math.isfinite(value):
        return "—"
    power = 0
    while abs(value) / 1000**power >= 999.5 and power < len(units) - 1:
        power += 1
    scaled = value / 1000**power
    digits = 0 if power == 0 or abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
    return f"{format_number(scaled, sd / 1000**power, digits)} {units[power]}".rstrip()


def format_bytes(value: float, sd: float = math.nan) -> str:
    """Bytes in units of 10^3, 10^6, 10^9 bytes."""
    return format_scaled(value, sd, ("B", "kB", "MB", "GB", "TB"))


def format_percent(value: float, sd: float = math.nan) -> str:
    """A share as a percentage."""
    return format_number(100 * value, 100 * sd, digits=1) + (" %" if math.isfinite(value) else "")


def format_times(value: float, sd: float = math.nan) -> str:
    """A ratio."""
    return format_number(value, sd, digits=2) + (" ×" if math.isfinite(value) else "")
