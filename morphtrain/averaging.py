"""How much of the averaged weights stays in a step (config key `ema`).

The half-life is in epochs, not in steps. So how much the weights of a moment count does not depend on the batch size,
which policies change, nor on how many images an epoch shows. The first weights are no good, and a fixed half-life would
carry them along: at first it is a tenth of what has been trained, as TensorFlow's `ExponentialMovingAverage` does it.
"""

from __future__ import annotations

YOUNG = 0.1  # of the epochs trained so far: the longest half-life


def kept(half_life: float, passed: float, trained: float) -> float:
    """The share (0 to 1) of the averages that stays in a step.

    Args:
        half_life: in epochs.
        passed: the share of an epoch that the step was.
        trained: epochs since the averages began, with this step.
    """
    return float(2 ** (-passed / min(half_life, YOUNG * trained)))


def described(half_life: float, steps: int) -> str:
    """A half-life beside the decay of a step that others would call it, with so many steps an epoch."""
    decay = kept(half_life, 1 / steps, float("inf"))
    return f"ema={half_life:g}: a half-life in epochs; with {steps} steps an epoch, a decay of {decay:.6g} a step"
