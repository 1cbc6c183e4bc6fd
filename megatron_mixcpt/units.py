"""Numbers, sizes and times as people read them."""

from __future__ import annotations


def number(value: float, digits: int = 4) -> str:
    """Short: 0.25, 12.5k, 3e-5; `digits` significant ones at most."""
    size = abs(value)
    if value == 0:
        return "0"
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit * 0.9995:
            return f"{value / limit:.{digits}g}{letter}" if size < 1e15 else f"{value:.2g}"
    if size < 1e-3:
        digits = max(3, digits - 1)
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{float(mantissa):.{digits}g}e{int(exponent)}"
    return f"{value:.{digits}g}"


def size(num_bytes: float) -> str:
    """`1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"


def duration(seconds: float) -> str:
    """`3h12m`, `4m05s` or `12s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def percent(share: float | None, digits: int = 1) -> str:
    """`12.5%`; a dash for what is not known."""
    return "–" if share is None else f"{share:.{digits}%}"
