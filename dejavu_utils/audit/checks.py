"""Negative controls: the same audit where there is nothing to find, on the same images.

Whatever a control finds is something other than memory, and then there is no verdict: none comes
from a broken instrument.
"""

import numpy as np
import pandas as pd
import torch

from dejavu_utils.attack import knn, scoring
from dejavu_utils.audit import membership
from dejavu_utils.audit.estimate import members_minus_held_out
from dejavu_utils.audit.evidence import Found, part
from dejavu_utils.audit.subject import Subject

# of the controls' intervals: of 100 audits without a fault, about three fail one of four
LEVEL = 0.99
PERMUTATIONS = 20
PERMUTED = "permuted public labels"
UNTRAINED = "random weights"
HALVES = "held-out minus held-out"
PICTURES = "pictures alone"


def controls(case: Subject, rows: pd.DataFrame, inferred: Found) -> pd.DataFrame:
    """Return the negative controls, a row each: control, score, low, high (99 %), n, passed.

    - permuted public labels: accuracy minus chance, over 20 permutations;
    - random weights: members minus held-out for the same network, its weights drawn anew;
    - held-out minus held-out: one half of the held-out images in the members' place;
    - pictures alone: can a classifier that knows nothing of the encoder tell members from held-out
      images of the same class (AUC - 0.5)? Then they differ in more than in having been trained
      on.

    Each should be 0, and `passed` is whether its interval holds 0 (the last: does not lie above).
    Without held-out images there is only the first one.
    """
    layer = case.layers[0]
    found = [{"control": PERMUTED} | permuted(case, inferred["members", layer, "target"])]
    if case.held_out is not None:
        members = part(rows, layer, "untrained", "members")
        held_out = part(rows, layer, "untrained", "held-out")
        untrained = members_minus_held_out(members, held_out, LEVEL)
        halves = split_held_out(part(rows, layer, which="held-out"))
        found.append({"control": UNTRAINED} | untrained)
        found.append({"control": HALVES} | halves)
        found.append({"control": PICTURES} | pictures_alone(case, inferred))
    return _passed(found)


def unlabelled(case: Subject, statistics: pd.DataFrame, inferred: Found) -> pd.DataFrame:
    """Return the negative controls of an audit without labels, as `controls` does.

    - random weights: AUC - 0.5 of the similarity under the same network, its weights drawn anew;
    - held-out minus held-out: AUC - 0.5 of the alignment gap of one half of the held-out images
      against the other;
    - pictures alone: see `controls`.
    """
    layer = case.layers[0]
    names = ("members", "held-out")
    untrained = np.concatenate([inferred[name, layer, "untrained"]["alignment"] for name in names])
    random = statistics.assign(alignment_gap=untrained)
    unseen = statistics[~statistics["member"]]
    mixed = unseen.iloc[np.random.default_rng(0).permutation(len(unseen))]
    first = _half(mixed) if "owner" in mixed else np.arange(len(mixed)) % 2 == 0
    halves = mixed.assign(member=first)
    found = [
        {"control": UNTRAINED} | membership.over_chance(random, "alignment_gap", LEVEL),
        {"control": HALVES} | membership.over_chance(halves, "alignment_gap", LEVEL),
        {"control": PICTURES} | pictures_alone(case, inferred),
    ]
    return _passed(found)


def _passed(found: list[dict]) -> pd.DataFrame:
    """Return the table of controls, with whether each found nothing."""
    table = pd.DataFrame(found)
    above = table["low"] > 0
    below = (table["high"] < 0) & (table["control"] != PICTURES)
    columns = ["control", "score", "low", "high", "n", "passed"]
    return table.assign(passed=~above & ~below)[columns]


def permuted(case: Subject, found: dict[str, np.ndarray]) -> dict[str, float]:
    """Return accuracy minus chance where the public labels are permuted: mean and interval over
    permutations.
    """
    truth = case.members.labels
    classes = len(case.public.classes)
    distances = torch.as_tensor(found["distances"])
    of_truth = np.bincount(truth, minlength=classes)

    values = []
    for seed in range(PERMUTATIONS):
        labels = np.random.default_rng(seed).permutation(case.public.labels)
        voted = torch.from_numpy(labels[found["neighbours"]])  # (n, k)
        guess = knn.vote(voted, distances, classes).prediction.numpy()
        of_guess = np.bincount(guess, minlength=classes)
        chance = (of_truth * of_guess).sum() / len(truth) ** 2
        values.append(round((guess == truth).mean() - chance, 12))

    mean = scoring.over_seeds(values, LEVEL)
    return {"score": mean["mean"], "low": mean["low"], "high": mean["high"], "n": len(truth)}


def split_held_out(rows: pd.DataFrame) -> dict[str, float]:
    """Return one half of the held-out images minus the other."""
    half = _half(rows)
    return members_minus_held_out(rows[half], rows[~half], LEVEL)


def _half(rows: pd.DataFrame) -> pd.Series:
    """Return which rows are of one half of the images, or of the owners where they are known."""
    drawn = rows["owner"] if "owner" in rows else rows["id"]
    mixed = np.random.default_rng(0).permutation(sorted(set(drawn)))
    return drawn.isin(mixed[::2])


def pictures_alone(case: Subject, inferred: Found) -> dict[str, float]:
    """Return AUC - 0.5 of telling members from held-out images by their crops alone.

    Logistic regression of random features (the untrained backbone's) and of simple statistics of
    the pixels, learned on half of the images (or of the owners) and judged on the other half. Each
    class's mean is subtracted first, so that another mix of classes is no difference. A blind
    baseline: whatever it tells apart, no training told it.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sets = case.attacked
    parts = [inferred[name, "backbone", "untrained"] for name in sets]
    features = np.concatenate([one["features"] for one in parts])
    pixels = np.concatenate([one["pixels"] for one in parts])
    x = np.concatenate([features, pixels], axis=1).astype(np.float64)  # (n, d)
    labels = np.concatenate([images.labels for images in sets.values()])
    member = np.repeat([True, False], [len(images) for images in sets.values()])
    for label in np.unique(labels):
        x[labels == label] -= x[labels == label].mean(0)

    owners = [case.owners(images) for images in sets.values()]
    by_owner = owners[0] is not None
    rows = pd.DataFrame({"member": member})
    unit = np.arange(len(x))
    if by_owner:
        rows["owner"] = np.concatenate(owners)
        unit = np.unique(rows["owner"].to_numpy(), return_inverse=True)[1]

    # one split, not several folds: their classifiers share images, and the interval is too short
    units = pd.Series(member).groupby(unit).max()  # a row each: is it one of members?
    learn, judge = train_test_split(
        units.index.to_numpy(), test_size=0.5, stratify=units, random_state=0
    )
    if by_owner:
        learn = np.flatnonzero(np.isin(unit, learn))
        judge = np.flatnonzero(np.isin(unit, judge))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    model.fit(x[learn], member[learn])
    judged = rows.iloc[judge].assign(score=model.decision_function(x[judge]))
    return membership.over_chance(judged, "score", LEVEL)


def boxes(case: Subject, inferred: Found) -> str:
    """Return a warning if boxes look wrong as a whole, else "".

    Boxes should hold what tells the class. They look wrong where the encoder names the object from
    whole pictures clearly more often than from what is in the boxes, and from that no more often
    than from the background crops: then the objects are elsewhere, and the crops may show them.
    """
    found = inferred["members", case.layers[0], "target"]
    if not case.boxed:
        return ""
    truth = case.members.labels[: case.boxed]
    crop = found["prediction"][: case.boxed] == truth
    box = found["in_box"] == truth
    whole = found["in_whole"] == truth

    lost = whole.astype(float) - box
    surely = lost.mean() - 1.96 * lost.std() / len(lost) ** 0.5  # lower end of its interval
    if surely <= 0 or box.mean() > crop.mean():
        return ""
    percent = [f"{100 * right.mean():.0f} %" for right in (whole, box, crop)]
    return (
        f"The boxes look wrong as a whole: of {case.boxed} members the encoder names {percent[0]} "
        f"from the whole picture, {percent[1]} from what is in the box, and {percent[2]} from the "
        "background crop. Look at the galleries of the report: no crop should show the object. (If "
        "none does, the objects are too small to be recognised alone.)"
    )
