"""What an experiment's records answer: a module for each kind of analysis that a declaration can name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from morphtrain.evidence.analyses import curves, factor, line, pays, ratio
from morphtrain.evidence.experiment import Experiment
from morphtrain.evidence.section import Section

if TYPE_CHECKING:
    import pandas as pd

ANALYSES = {
    "pays": pays.section,
    "ratio": ratio.section,
    "factor": factor.section,
    "line": line.section,
    "curves": curves.section,
}


def section(experiment: Experiment, table: pd.DataFrame) -> Section:
    """The section of an experiment.

    Args:
        table: of `records.load` of its runs, those that have finished.
    """
    return ANALYSES[experiment.analysis](experiment, table)
