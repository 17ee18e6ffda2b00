"""The largest batch that fits, where finding out whether one does is what costs."""

from __future__ import annotations

from collections.abc import Callable

FIRST_STRIDE = 0.05  # of the guess; it doubles until the boundary is between two sizes that were tried


def largest_fitting(fits: Callable[[int], bool], guess: int, tolerance: float = 0.01) -> int:
    """A batch of 1 or more that fits and of which one larger by `tolerance` (or by one sample) does not.

    Starts at `guess` and bisects only between the last size that fits and the first one that does not. `fits` is
    called once for a size; what is returned has been tried. 0 if one sample does not fit.
    """
    stride = max(1, round(guess * FIRST_STRIDE))
    fitting, failing = (guess, None) if fits(guess) else (0, guess)
    while failing is None:
        larger = fitting + stride
        fitting, failing = (larger, None) if fits(larger) else (fitting, larger)
        stride *= 2
    while fitting == 0 and failing > 1:
        smaller = max(1, failing - stride)
        fitting, failing = (smaller, failing) if fits(smaller) else (0, smaller)
        stride *= 2
    while failing - fitting > max(1, tolerance * fitting):
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting
