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
    guesses: pd.DataFrame | None  # see evidence.table; None without labels, as what rests on it
    scores: pd.DataFrame  # see estimate.scores
    controls: pd.DataFrame  # see checks.controls
    warning: str  # see checks.boxes; "" for none
    classes: pd.DataFrame | None  # see estimate.by_class
    owners: pd.DataFrame | None  # see estimate.by_owner; None where no owners are known
    split: dict[str, float] | None  # see scoring.four_way
    verdict: Verdict
    statistics: pd.DataFrame | None  # see membership.statistics; None without held-out images
    membership: pd.DataFrame | None  # see membership.summary

    @property
    def status(self) -> int:
        """The exit status: 0 no evidence, 3 memorizes, 4 undecided."""
        return self.verdict.status
