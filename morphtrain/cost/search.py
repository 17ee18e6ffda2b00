"""The largest batch that fits, found with few tries: each one costs."""

from __future__ import annotations

from collections.abc import Callable

FIRST_STRIDE = 0.05  # of the guess; it doubles until the boundary is between two sizes that were tried


def largest_fitting(fits: Callable[[int], bool], guess: int, tolerance: float = 0.01) -> int:
    """The largest batch that fits, to a relative `tolerance` or one sample; 0 if not even one sample fits.

    The search starts at `guess`, steps away from it until one size fits and another does not, and bisects between the
    two. `fits` is called at most once for each size; the size that is returned has been tried.
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
