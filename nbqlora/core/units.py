"""The only place where bytes, seconds and counts become text.

One spelling per quantity keeps plan, report, bar and error comparable at a glance.
"""

from __future__ import annotations

GIB = 1 << 30
MIB = 1 << 20


def gib(n_bytes: float) -> float:
    """Bytes as GiB (2**30 bytes)."""
    return n_bytes / GIB


def format_bytes(n_bytes: float) -> str:
    """``13.3 GiB``, ``0.04 GiB`` or ``8 MiB``: never a bare byte count."""
    size = abs(n_bytes)
    if size >= 99.95 * GIB:
        return f"{n_bytes / GIB:.0f} GiB"
    if size >= 0.995 * GIB:
        return f"{n_bytes / GIB:.1f} GiB"
    if size >= 10 * MIB:
        return f"{n_bytes / GIB:.2f} GiB"
    return f"{n_bytes / MIB:.0f} MiB" if size >= MIB or size == 0 else f"{n_bytes / 1024:.0f} KiB"


def format_seconds(seconds: float) -> str:
    """``0.8 s``, ``42 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def format_minutes(seconds: float) -> str:
    """A forecast, coarse on purpose: ``under 1 min``, ``about 41 min``, ``about 3 h 20 min``."""
    if seconds < 60:
        return "under 1 min"
    minutes = round(seconds / 60)
    return "about " + (f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min")


def format_count(n: float) -> str:
    """``812``, ``13.4k``, ``135M``, ``8.03B``."""
    for limit, divisor, suffix in ((9_999.5, 1, ""), (999_500, 1e3, "k"), (999_500_000, 1e6, "M")):
        if abs(n) < limit:
            scaled = n / divisor
            return f"{scaled:.0f}{suffix}" if divisor == 1 or scaled >= 99.95 else f"{scaled:.1f}{suffix}"
    return f"{n / 1e9:.2f}B"
