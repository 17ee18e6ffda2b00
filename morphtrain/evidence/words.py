"""Numbers and names as they are read: as many digits as an interval warrants, metrics in words."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNKNOWN = "not known"
MORE, LESS = "more is better", "less is better"
LESS_IS_BETTER = ("seconds", "loss", "time_to_accuracy", "params", "macs", "memory_bytes")
METRICS = {
    "calibrated_train_seconds": "training time in calibrated seconds",
    "train_seconds": "training time in seconds",
    "calibrated_time_to_accuracy": "the time to the target accuracy in calibrated seconds",
    "time_to_accuracy": "the time to the target accuracy in seconds",
    "median_epoch_seconds": "the median time of an epoch in seconds",
    "calibrated_seconds": "the time of an epoch in calibrated seconds",
    "epoch_seconds": "the time of an epoch in seconds",
    "test_accuracy": "test accuracy",
    "val_accuracy": "validation accuracy",
    "params": "the number of parameters",
    "macs": "MACs of one image",
    "batch_size": "the batch size",
    "channel_density": "the share of channels that is left",
    "weight_density": "the share of weights that is left",
}


def metric(name: str) -> str:
    """A metric in words; one without any as it is called."""
    return METRICS.get(name, name)


def better(name: str) -> str:
    """Which direction of a metric is better, "" if neither is by itself."""
    if name.endswith(LESS_IS_BETTER):  # time_to_accuracy is a time
        return LESS
    return MORE if name.endswith(("accuracy", "samples_per_second")) else ""


def sentence(text: str) -> str:
    """With a capital at its beginning."""
    return text[:1].upper() + text[1:]


def number(value: float) -> str:
    """Four significant digits; whole numbers in full."""
    if not math.isfinite(value):
        return UNKNOWN
    if abs(value) < 1e15 and (float(value).is_integer() or abs(value) >= 1e4):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def p_value(p: float) -> str:
    """`p = 0.012`; never 0."""
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def interval(value: float, low: float | None, high: float | None, *, signed: bool = False) -> str:
    """`value [low, high]`, to two significant digits of the interval's width; `value` alone without an interval.

    Args:
        signed: with a + before what is above 0, as a difference is written.
    """
    sign = "+" if signed else ""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return (sign if value > 0 else "") + number(value)
    width = high - low
    largest = max(abs(low), abs(high))
    if width <= 1e-9 * largest:  # rounding
        return f"{value:{sign}.6g} [{low:{sign}.6g}, {high:{sign}.6g}]"
    places = 1 - math.floor(math.log10(width))
    if places > 6:  # decimals would be many zeros
        digits = places + 1 + math.floor(math.log10(largest))
        return f"{value:{sign}.{digits}g} [{low:{sign}.{digits}g}, {high:{sign}.{digits}g}]"
    digits = max(places, 0)
    return " ".join((f"{value:{sign},.{digits}f}", f"[{low:{sign},.{digits}f}, {high:{sign},.{digits}f}]"))


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def compact(value: float) -> str:
    """A size at a glance, to three digits: `297k`, `1.2M`."""
    rounded = float(f"{value:.3g}")
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if rounded >= size:
            return f"{rounded / size:.3g}{unit}"
    return f"{rounded:g}"
