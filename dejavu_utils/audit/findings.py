"""`Findings`: all that an audit found, as tables and arrays."""

from dataclasses import dataclass

import pandas as pd

from dejavu_utils.audit.conclusion import Verdict
from dejavu_utils.audit.evidence import Found
from dejavu_utils.audit.settings import Settings
from dejavu_utils.audit.subject import Subject


@dataclass(frozen=True, eq=False)
class Findings:
    """What an audit found: the verdict, and what is behind it."""

    case: Subject
    settings: Settings
    asked: dict[str, str]  # encoder and reference, as they were asked for
    inferred: Found
    guesses: pd.DataFrame  # see evidence.table
    scores: pd.DataFrame  # see estimate.scores
    controls: pd.DataFrame  # see checks.controls
    classes: pd.DataFrame  # see estimate.by_class
    split: dict[str, float]  # see scoring.four_way
    verdict: Verdict
    statistics: pd.DataFrame | None  # see membership.statistics; None without held-out images
    membership: pd.DataFrame | None  # see membership.summary

    @property
    def status(self) -> int:
        """The exit status: 0 no evidence, 3 memorizes, 4 undecided."""
        return self.verdict.status
