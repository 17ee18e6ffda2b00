"""The thesis's chapter 3 beside what was measured: a verdict follows from a claim and the measured interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morphtrain.evidence import words
from morphtrain.evidence.analyses import no_worse, values
from morphtrain.evidence.comparisons import DIFFERENCE, Comparison
from morphtrain.evidence.frontier import CANNOT_TELL
from morphtrain.evidence.regressions import Coefficient
from morphtrain.report.question import Question
from morphtrain.report.tables import Column, Link, Shown
from morphtrain.wording import counted

FILE = Path(__file__).with_name("chapter3.yaml")
TEXT = (
    "What the draft of June 2020 reported, and what was measured here. The draft measured ResNets on CIFAR-10 and one "
    "GPU (GTX 1080 Ti, RTX 2080 Ti), mostly without intervals; every question's section says what was measured on "
    "what. The verdict follows by rule: the 95 % interval of the measured effect lies on the claimed side of no effect "
    "(agrees), on the other (disagrees), or on both (cannot tell yet). Where the claim is that "
    "nothing is lost, the margin that was declared takes the place of no effect."
)
AGREES, DISAGREES, UNTOLD = "agrees", "disagrees", "cannot tell yet"
OF_NO_WORSE = {no_worse.NO_WORSE: AGREES, no_worse.WORSE: DISAGREES, CANNOT_TELL: UNTOLD}


@dataclass(frozen=True)
class Claim:
    """A row of the file; see its head."""

    where: str
    reported: str
    experiment: str
    expects: Mapping[str, str] | None = None
    needs: str = ""


def read() -> list[Claim]:
    """All claims, in the order of the draft."""
    from omegaconf import OmegaConf

    rows: Any = OmegaConf.to_container(OmegaConf.load(FILE))
    return [Claim(**row) for row in rows]


def table(questions: Sequence[Question]) -> Shown:
    """A row for each claim. Of an experiment at two sizes the larger counts."""
    by_name = {question.experiment.name: question for question in sorted(questions, key=_is_full_size)}
    columns = tuple(Column(name, False) for name in ("In the draft", "What it reports", "Measured here", "Verdict"))
    rows = []
    for claim in read():
        question = by_name.get(claim.experiment)
        measured: str | Link = f"not yet run: {claim.experiment}"
        if question is not None:
            measured = Link(measured_for(claim, question), question.anchor)
        rows.append((claim.where, claim.reported, measured, verdict(claim, question)))
    return Shown("Chapter 3 of the draft, claim by claim.", columns, tuple(rows))


def _is_full_size(question: Question) -> bool:
    return question.experiment.size == "thesis"


def verdict(claim: Claim, question: Question | None) -> str:
    """not yet run, needs a GPU, or what the measured effect says of the claim."""
    if claim.needs == "gpu" and (question is None or not question.on_gpu):
        return "needs a GPU"
    if question is None:
        return "not yet run"
    if not question.section.tables:
        return "too few runs yet"
    if claim.expects is None:
        return UNTOLD if question.is_open else "open in the draft, answered here"
    return judged(claim.expects, question)


def measured_for(claim: Claim, question: Question) -> str:
    """The effect that the claim's verdict rests on; the answer, where that is the same or there is none."""
    effect = None if claim.expects is None else _effect(claim.expects, question)
    if claim.expects is None or not isinstance(effect, Comparison):
        return question.section.answer
    what = words.metric(claim.expects.get("metric", question.experiment.response))
    found = words.interval(effect.effect, effect.low, effect.high, signed=True)
    return f"{words.sentence(what)}, {' - '.join(effect.names)}: {found} (n = {counted(effect.n[0], 'seed')})."


def judged(expects: Mapping[str, str], question: Question) -> str:
    """What the interval of a slope, or of the differences between two arms, says of a claim."""
    effect = _effect(expects, question)
    if effect is None:
        return "too few runs yet"
    low, high = effect.low, effect.high
    if expects["is"] == no_worse.NO_WORSE and isinstance(effect, Comparison):
        metric = expects.get("metric", question.experiment.response)
        return OF_NO_WORSE[no_worse.verdict(effect, metric, question.experiment.margin)]
    if low is None or high is None or low <= 0 <= high:
        return UNTOLD
    right = expects["is"] == "different" or (low > 0) == (expects["is"] == "higher")
    return AGREES if right else DISAGREES


def _effect(expects: Mapping[str, str], question: Question) -> Coefficient | Comparison | None:
    experiment = question.experiment
    if question.section.slope is not None:
        return question.section.slope
    found = values.last(experiment, question.finished, expects.get("metric", experiment.response))
    arm, against = expects.get("arm"), expects.get("against", next(iter(found)))
    if arm is None or not {arm, against} <= found.keys():  # of an earlier version, or somebody else's of this name
        return None
    return values.compared({against: found[against], arm: found[arm]}, DIFFERENCE).get(arm)
