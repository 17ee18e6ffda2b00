"""What times that were taken in turns, in blocks, tell of a ratio, and what may be wrong with them.

Turns come in blocks, A B B A or B A A B: a machine that becomes steadily slower or faster takes as much from A as from
B within one, and what lasts longer is common to both. So blocks are nearly independent where the times are not; and as
each has its order by chance, what comes every so many turns does not fall to one side.

What the interval counts as one value is such a block, two pairs of times. Where each time was taken in several turns,
whole blocks of them, it is a pair.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from morphtrain.evidence.repeats import LEAST_FOR_INTERVAL, Estimate, paired_ratio
from morphtrain.wording import counted

PAIRS = 2  # of neighbours, in a block
FEW_BLOCKS = 5  # with fewer, the interval rests on an uncertain scatter

# What is worth a word. The first, the second and the idea of the last are those of `pyperf check` (Victor Stinner).
SCATTER = 0.1  # standard deviation of the ratio from block to block, as a share
OUTLIER = 1.5  # times what is expected
SHORT_SECONDS = 0.005  # about as long as a system lets one process run before another gets its turn
CHANGE = 0.05  # of the ratio from the first third to the last
SURE = 0.01  # largest p of a trend that is called one
DRIFT = 0.1  # of the machine's speed
FOREIGN = 0.1  # share of the cores that others used


def blocks(a: Sequence[float], b: Sequence[float], pairs: int = PAIRS) -> tuple[list[float], list[float]]:
    """The geometric mean of each side's times in each whole block of so many pairs; what is left over is not used."""
    whole = min(len(a), len(b)) // pairs
    means = ([statistics.geometric_mean(side[pairs * n : pairs * (n + 1)]) for n in range(whole)] for side in (a, b))
    first, second = means
    return first, second


def block_ratio(a: Sequence[float], b: Sequence[float], pairs: int = PAIRS) -> Estimate | None:
    """The geometric mean of B / A over blocks, with Student's t interval of the mean logarithm; None without a block.

    Args:
        a, b: seconds; a[n] and b[n] are neighbours in time.
        pairs: of them, in a block.
    """
    first, second = blocks(a, b, pairs)
    return paired_ratio(dict(enumerate(second)), dict(enumerate(first)))


@dataclass(frozen=True)
class Turns:
    """Times taken in turns, without warm-up, and what else is known of them.

    Args:
        a, b: seconds; a[n] and b[n] are neighbours in time.
        unit: what one time is of: "epoch" or "step".
        changed: whether a network changed its structure meanwhile.
        foreign_cpu: share of the cores (0 to 1) that other processes used; None if that is not known.
        others: ids of processes that trained on the same device or cores.
        parts: in how many turns each time was taken.
    """

    a: Sequence[float]
    b: Sequence[float]
    unit: str
    changed: bool = False
    foreign_cpu: float | None = None
    others: Sequence[int] = ()
    parts: int = 1

    @property
    def more(self) -> str:
        """How the user gets more of them."""
        return "a larger --steps" if self.unit == "step" else "more epochs"

    @property
    def pairs(self) -> int:
        """How many pairs of times are a block."""
        return PAIRS if self.parts == 1 else 1

    @property
    def ratio(self) -> Estimate | None:
        """B / A, see `block_ratio`."""
        return block_ratio(self.a, self.b, self.pairs)

    @property
    def ratios(self) -> list[float]:
        """Logarithms of B / A, by block."""
        return [math.log(b / a) for a, b in zip(*blocks(self.a, self.b, self.pairs), strict=True)]

    @property
    def block(self) -> str:
        """What the interval counts as one value, in a word."""
        return "pair" if self.pairs == 1 else "block"


def doubts(turns: Turns) -> list[str]:
    """What makes a ratio doubtful, a sentence each with the number and what would help; empty if nothing does."""
    found = (_few, _scattered, _changing, _outlying, _drifting, _disturbed, _short)
    return [sentence for check in found for sentence in check(turns)]


def _few(turns: Turns) -> Iterator[str]:
    number = len(turns.ratios)
    if number < LEAST_FOR_INTERVAL:
        yield f"only {counted(number, turns.block)}, of which no interval can be told: {turns.more}"
    elif number < FEW_BLOCKS:
        yield f"only {counted(number, turns.block)}, so the interval is wide and itself uncertain: {turns.more}"


def _scattered(turns: Turns) -> Iterator[str]:
    """Scatter from one block to the next, so that a ratio that slowly changes does not count as unstable."""
    ratios = turns.ratios
    if len(ratios) < LEAST_FOR_INTERVAL:
        return
    steps = [after - before for before, after in itertools.pairwise(ratios)]
    scatter = math.sqrt(statistics.fmean(step**2 for step in steps) / 2)
    if scatter > SCATTER:
        longer = "a larger batch" if turns.unit == "step" else "longer ones, or turns by --steps"
        help_ = f"close other programs, or take {turns.more}, or {longer}; timing.cores=1 keeps to one core"
        yield f"B / A scatters by {math.expm1(scatter):.0%} from {turns.block} to {turns.block}: {help_}"


def _changing(turns: Turns) -> Iterator[str]:
    """A ratio that is another at the end."""
    ratios = turns.ratios
    if (line := _trend(ratios)) is None:
        return
    slope, _, p = line
    start, end = (math.exp(statistics.fmean(part)) for part in _thirds(ratios))
    if p < SURE and abs(slope) * len(ratios) > CHANGE and abs(math.log(end / start)) > CHANGE:
        of_one = "compare single networks with architecture=<checkpoint> and --steps" if turns.changed else turns.more
        yield (
            f"B / A goes from {start:.3f} in the first third to {end:.3f} in the last: the ratio is a mean of all, and "
            f"its interval counts the change as scatter; {of_one}"
        )


def _outlying(turns: Turns) -> Iterator[str]:
    """Pairs far off the line through all of them."""
    pairs = [math.log(b / a) for a, b in zip(turns.a, turns.b, strict=False)]
    if len(pairs) < 2 * LEAST_FOR_INTERVAL:
        return
    slope, start, _ = _trend(pairs) or (0.0, statistics.median(pairs), 1.0)
    rest = [ratio - (start + slope * number) for number, ratio in enumerate(pairs)]
    middle = statistics.median(rest)
    if off := sum(abs(value - middle) > math.log(OUTLIER) for value in rest):
        help_ = "something else ran for moments, and they count in the interval; repeat it on a quieter machine"
        yield f"{off} of {len(pairs)} pairs are off the others by more than {OUTLIER - 1:.0%}: {help_}"


def _drifting(turns: Turns) -> Iterator[str]:
    """Both sides slower, or both faster, at the end: that is the machine, unless the networks changed."""
    if turns.changed or len(turns.ratios) < LEAST_FOR_INTERVAL:
        return
    sides = map(_thirds, (turns.a, turns.b))
    moves = [math.log(statistics.fmean(end) / statistics.fmean(start)) for start, end in sides]
    common = min(moves, key=abs)
    if moves[0] * moves[1] > 0 and abs(common) > math.log1p(DRIFT):
        word = "slower" if common > 0 else "faster"
        shared = "neighbours share that, so the ratio stands, but the seconds do not"
        yield f"the machine became {math.expm1(abs(common)):.0%} {word}: {shared}; let it warm up, and plug it in"


def _disturbed(turns: Turns) -> Iterator[str]:
    if turns.others:
        numbers = ", ".join(map(str, turns.others))
        yield f"process {numbers} trained on the same device or cores: wait for its end, or timing.when_busy=wait"
    elif turns.foreign_cpu is not None and turns.foreign_cpu > FOREIGN:
        yield f"others used {turns.foreign_cpu:.0%} of the cores: close them, or leave them a core with timing.cores"


def _short(turns: Turns) -> Iterator[str]:
    of_one = min((statistics.median(side) for side in (turns.a, turns.b) if side), default=math.inf)
    shortest = of_one / turns.parts
    if shortest < SHORT_SECONDS:
        turn = "a step" if turns.unit == "step" else "an epoch" if turns.parts == 1 else "a turn"
        longer = "more images" if turn == "an epoch" else "a larger batch or network"
        why = "caches that the other side has filled and the system's turns weigh much in so short a time"
        yield f"{turn} takes {1e3 * shortest:.2g} ms: {why}; {longer}"


def _trend(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Slope, start and p of the line through values in their order; None for too few to tell."""
    if len(values) < 2 * LEAST_FOR_INTERVAL:
        return None
    from scipy import stats

    line = stats.linregress(range(len(values)), values)
    return float(line.slope), float(line.intercept), float(line.pvalue)


def _thirds(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The first and the last third."""
    third = max(1, len(values) // 3)
    return values[:third], values[-third:]
