"""The verdict of an audit: "memorizes", "no evidence" or "undecided", and why."""

import math
from dataclasses import dataclass

import pandas as pd

from dejavu_utils.attack import scoring
from dejavu_utils.audit import estimate
from dejavu_utils.audit.subject import Subject

POWER = 2.8  # standard errors of an effect for which a 95 % interval excludes 0 four times in five
# what the encoder is shown by each kind of crop, and what that is called
SHOWN = {
    "periphery": ("nothing but background", "background"),
    "corner": ("only a corner, which may hold a part of the object", "corner"),
}
STATUS = {"no evidence": 0, "memorizes": 3, "undecided": 4}  # of `python -m dejavu_utils.audit`
SENTENCES = {
    "memorizes": "Memorizes: shown {shown}, the encoder names the objects of its "
    "members more often than the {piece} explains.",
    "no evidence": "No evidence: shown {shown}, the encoder names the objects of "
    "the members about as often as the {piece} explains; memory of {margin:.3g} points or more "
    "is excluded, less is not.",
    "undecided": "Undecided, because the interval holds both no memory and a substantial one "
    "({margin:.3g} points): so few images show only effects of about {smallest:.0f} points "
    "reliably. Pass more images, and more held-out ones.",
    "few": "Undecided, because {n} images are too few for an interval: pass {fewest} or more "
    "members, and as many held-out images.",
    "owners": "Undecided, because {owners} owners are too few for an interval: pictures of one "
    "owner are alike, so owners count. Pass pictures of {fewest_owners} owners or more, and "
    "held-out ones of as many.",
    "disagree": "Undecided, because no held-out images were passed, and then the score of the "
    "members and members minus public images must lead to one verdict; they do not. Pass held-out "
    "images.",
    "offset": "Undecided, because there are no held-out images, and too few public ones have a "
    "background crop: how strong the reference is beside this encoder is not known. Pass held-out "
    "images, or a second model.",
    "control": "Undecided, because a control that must find nothing found something ({failed}): on "
    "these images something other than memory makes a score. Look for members and held-out images "
    "that differ in kind or in how they were stored, and for public copies of members.",
}
# in place of these, where pictures have no labels
UNLABELLED = {
    "memorizes": "Memorizes, in the weak sense that needs no labels: the encoder finds a corner of "
    "a picture and the whole of it more alike for members than for held-out pictures. Whether it "
    "remembers what they show cannot be said without classes.",
    "no evidence": "No evidence: the encoder finds a corner of a picture and the whole of it about "
    "as much alike for held-out pictures as for members; telling them apart by {margin:.3g} points "
    "(of AUC, over chance) or more is excluded, less is not. What they show was not asked.",
}


@dataclass(frozen=True)
class Verdict:
    """A verdict, and the score that it rests on."""

    word: str  # of STATUS
    why: str  # of SENTENCES
    sentence: str
    reading: str  # of estimate.scores
    score: float
    low: float
    high: float
    n: int
    margin: float
    smallest: float  # effect that so many images show four times in five

    @property
    def status(self) -> int:
        """The exit status that says it."""
        return STATUS[self.word]


def verdict(
    case: Subject, scores: pd.DataFrame, controls: pd.DataFrame, margin: float = 0.05
) -> Verdict:
    """Return the verdict by the 95 % interval of the score at the judged layer.

    All of it above 0: the encoder memorizes; else all below `margin`: no evidence; else undecided.
    With held-out images, members minus held-out decides; with a second model and none, the score of
    the members; with neither, a part of X stands in, and both must lead to one verdict. A failed
    control, or too few images, make every verdict "undecided".
    """
    wanted = _readings(case)
    own = scores[(scores["layer"] == case.layers[0]) & (scores["p"] == 100)]
    rows = {row["reading"]: row for row in own.to_dict("records")}
    row = rows[wanted[0]]
    failed = list(controls["control"][~controls["passed"]])
    words = {_word(rows[name]["low"], rows[name]["high"], margin) for name in wanted}

    if failed:
        why = "control"
    elif case.held_out is None and case.reference is None:
        why = "offset"
    elif pd.isna(row["low"]):
        few_owners = row.get("owners", math.inf) < estimate.FEWEST_OWNERS
        enough = estimate.fewest(row) >= scoring.FEWEST
        why = "owners" if few_owners and enough else "few"
    elif len(words) > 1:
        why = "disagree"
    else:
        why = words.pop()

    smallest = POWER / 1.96 * (row["high"] - row["low"]) / 2
    sentences = SENTENCES if case.labelled else SENTENCES | UNLABELLED
    shown, piece = SHOWN[case.crop["kind"]]
    sentence = sentences[why].format(
        shown=shown,
        piece=piece,
        margin=100 * margin,
        smallest=100 * smallest,
        failed=", ".join(failed),
        n=estimate.fewest(row),
        fewest=scoring.FEWEST,
        owners=row.get("owners"),
        fewest_owners=estimate.FEWEST_OWNERS,
    )
    return Verdict(
        word=why if why in STATUS else "undecided",
        why=why,
        sentence=sentence,
        reading=wanted[0],
        score=float(row["score"]),
        low=float(row["low"]),
        high=float(row["high"]),
        n=int(row["n"]),
        margin=margin,
        smallest=float(smallest),
    )


def _readings(case: Subject) -> list[str]:
    """Return the readings that decide, the first one foremost."""
    if case.source == "held-out":
        return [estimate.DIFFERENCE]
    if case.reference is not None or case.held_out is None:
        return ["members"]
    return [estimate.DIFFERENCE, "members"]


def _word(low: float, high: float, margin: float) -> str:
    if low > 0:
        return "memorizes"
    return "no evidence" if high < margin else "undecided"
