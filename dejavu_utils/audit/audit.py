"""An audit: does one encoder remember its training images? Nothing is retrained, and one verdict
comes out.

The encoder names the objects of its training images from their background crops (attack.infer). Its
accuracy minus that of a reference that never saw the image is the score. The reference is a second
model, or else a classifier on crops, cross-fitted (the one-model test, Kokhlikyan et al. 2024).
Such a classifier may be weaker or stronger than the encoder even where nothing is remembered: the
score of *unseen* images is that offset, and the calibrated score is free of it.
"""

import numpy as np
import pandas as pd
import torch
from scipy.special import entr

from dejavu_utils.attack import inference, knn, one_model, references, scoring
from dejavu_utils.audit.subject import Subject
from dejavu_utils.data.images import Images
from dejavu_utils.models import encoders

# level of the controls' intervals: of 100 audits without a fault, about three fail one of three
CONTROLS = 0.99
PERMUTATIONS = 20
POWER = 2.8  # standard errors of an effect for which a 95 % interval excludes 0 four times in five
WORDS = ("memorizes", "no evidence", "undecided")
SENTENCES = {
    "memorizes": "Shown nothing but background, the encoder names the objects of the audited "
    "images more often than "
    "the background explains: it remembers some of these images.",
    "no evidence": "Shown nothing but background, the encoder names the objects of the audited "
    "images about as often "
    "as the background explains. Memory of {margin:.0f} points or more is excluded, less is not.",
    "undecided": "The interval holds both no memory and a substantial one ({margin:.0f} points). "
    "So few images show "
    "only effects of about {smallest:.0f} points reliably: pass more images, and more held-out "
    "ones.",
    "disagree": "Without held-out images, the plain score and the one calibrated on public images "
    "must lead to one "
    "verdict; they do not. Pass held-out images.",
    "offset": "How strong the classifier on crops is beside this encoder is not known: there are "
    "no held-out images, "
    "and too few public ones have a background crop. Pass held-out images, or a second model.",
    "control": "A negative control failed ({failed}): on these images something other than memory "
    "makes a score. Look "
    "for copies of audited images among the public ones, and for unseen images unlike the audited "
    "ones.",
}


def infer(case: Subject, k: int, device: str = "cpu") -> dict:
    """Return {(set, layer, model): attack.infer's findings} for the sets "audited" and "unseen".

    Those of the untrained backbone also hold its embeddings of the crops, `features` (n, d). Models
    are "target", "untrained" (the same network, its weights drawn anew) and, if there is one,
    "reference". Pictures are decoded once for all of them.
    """
    models = {"target": case.encoder, "untrained": encoders.untrained(case.encoder)}
    if case.reference is not None:
        models["reference"] = case.reference
    how, labels, found = (
        {"size": case.size, "layers": case.layers, "device": device},
        case.public.labels,
        {},
    )
    bank = references.embed_images(models, case.public, **how)
    for name, images in case.attacked.items():
        queries = references.embed_images(models, images, rects=case.rects(images), **how)
        found |= {
            (name, layer, model): inference.infer(
                queries[layer][model], bank[layer][model], labels, k, len(case.public.classes)
            )
            for layer in case.layers
            for model in models
        }
        found[name, "backbone", "untrained"]["features"] = queries["backbone"]["untrained"].numpy()
    return found


def judge(
    case: Subject,
    inferred: dict,
    kind: str = "naive_bayes",
    folds: int = 5,
    seed: int = 0,
    device: str = "cpu",
) -> dict:
    """Return {set: (prediction, confidence, belief)}: what classifiers on crops say, which never
    saw the image.

    `kind` "naive_bayes" reads the untrained network's backbone, "network" (slower) the crops at 32
    px; neither knows the encoder. Each is fitted on the audited images of the other folds; unseen
    images are dealt out, too, but only judged. `belief` is the probability of the true class.
    Kokhlikyan et al. 2024.
    """
    sets = case.attacked
    labels = np.concatenate([images.labels for images in sets.values()])
    part = np.repeat(np.arange(len(sets)), [len(images) for images in sets.values()])
    if kind == "network":
        x, fit = (
            torch.cat([case.squares(images, 32) for images in sets.values()]),
            one_model.network(device=device),
        )
    elif kind == "naive_bayes":
        x = np.concatenate([inferred[name, "backbone", "untrained"]["features"] for name in sets])
        fit = one_model.naive_bayes
    else:
        raise ValueError(f'audit.classifier: {kind!r}; expected "naive_bayes" or "network".')
    ids = np.concatenate(
        [np.char.add(f"{name}/", images.ids.astype(str)) for name, images in sets.items()]
    )
    fold = one_model.assign(ids, 2 * labels + part, folds, seed)
    chances = one_model.cross_fit(fit, x, labels, fold, len(case.public.classes), part == 0, seed)
    said = chances.argmax(1), -entr(chances).sum(1), chances[np.arange(len(labels)), labels]
    return {name: tuple(each[part == i] for each in said) for i, name in enumerate(sets)}


def table(case: Subject, inferred: dict, judged: dict | None = None) -> pd.DataFrame:
    """Return a tidy table, a row per set, layer, model ("target", "untrained"), role and image (see
    attack).

    The reference is the second model, or `judged`, what the classifiers on crops say; the untrained
    network is compared with the same one. `belief` is the share of votes, or the probability, that
    a role gives to the truth.
    """
    parts = []
    for (name, layer, model), found in inferred.items():
        second, images = inferred.get((name, layer, "reference")), case.attacked[name]
        guesses = {"target": _said(case, found, images)}
        guesses["reference"] = _said(case, second, images) if second else judged[name]
        for role, (guess, confidence, belief) in guesses.items() if model != "reference" else ():
            rows = {
                "id": images.ids,
                "label": images.labels,
                "prediction": guess,
                "correct": guess == images.labels,
                "confidence": confidence,
                "belief": belief,
            }
            parts.append(
                pd.DataFrame(rows).assign(
                    set=name, layer=layer, model=model, role=role, direction="a"
                )
            )
    return pd.concat(parts, ignore_index=True)


def _said(case: Subject, found: dict, images: Images) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (prediction, confidence, belief) of an encoder's neighbours."""
    votes = case.public.labels[found["neighbours"]] == images.labels[:, None]
    return found["prediction"], found["confidence"], votes.mean(1)


def part(
    rows: pd.DataFrame, layer: str, model: str = "target", which: str = "audited"
) -> pd.DataFrame:
    """Return the rows of one set, layer and model: what attack.score and attack.four_way take."""
    return rows[(rows["layer"] == layer) & (rows["model"] == model) & (rows["set"] == which)]


def _sums(rows: pd.DataFrame, seed: int, resamples: int) -> np.ndarray:
    """Return n, and the sums of t, b, t * b and b * b over all images: (5, 1 + resamples), the data
    itself first.

    t is whether the target is right, b the reference's belief. From 50 classes on the bootstrap
    draws classes.
    """
    wide = rows.pivot(index=["label", "id"], columns="role", values=["correct", "belief"]).astype(
        float
    )
    t, b = wide["correct", "target"].to_numpy(), wide["belief", "reference"].to_numpy()
    terms, labels = (
        np.c_[np.ones(len(t)), t, b, t * b, b * b],
        wide.index.get_level_values("label").to_numpy(),
    )
    if len(np.unique(labels)) >= scoring.CLUSTER_FROM:
        terms = np.stack([terms[labels == label].sum(0) for label in np.unique(labels)])
    equal = np.full(len(terms), 1 / len(terms))
    drawn = np.random.default_rng([seed, len(t)]).multinomial(len(terms), equal, resamples)
    return (np.r_[np.ones((1, len(terms))), drawn] @ terms).T


def calibrated(
    audited: pd.DataFrame, unseen: pd.DataFrame, level: float = 0.95, resamples: int = 2000
) -> dict:
    """Return target accuracy on the audited images minus that expected without memory, with its
    bootstrap interval.

    What is expected comes from the unseen images: there a line is fitted through "the target is
    right" over the reference's belief in the truth, and read at the audited images' mean belief. 0
    is expected where the audited images were not trained on, however strong the reference. Both
    sets are resampled, the line is fitted anew in each. Keys: score, low, high, target, reference
    (expected without memory), n.
    """
    (n, t, b, *_), (m, s, c, sc, cc) = (
        _sums(rows, seed, resamples) for seed, rows in enumerate((audited, unseen))
    )
    spread = m * cc - c * c
    slope = np.divide(
        m * sc - s * c, spread, out=np.zeros_like(spread), where=spread > 1e-9 * m * m
    )
    expected = s / m + slope * (b / n - c / m)
    row = scoring.bounds(t / n - expected, "score", "", level)
    return row | {
        "target": float(t[0] / n[0]),
        "reference": float(expected[0]),
        "n": audited["id"].nunique(),
    }


def scores(rows: pd.DataFrame, top_p: tuple[float, ...] = (100, 20)) -> pd.DataFrame:
    """Return the scores, a row per layer, reading ("audited", "unseen", "calibrated") and p %, with
    intervals and n.
    """
    found = []
    for layer in rows["layer"].unique():
        sets = {name: part(rows, layer, which=name) for name in rows["set"].unique()}
        found += [
            {"layer": layer, "reading": name} | row
            for name, one in sets.items()
            for row in scoring.curve(one, top_p)
        ]
        if len(sets) == 2:
            found.append(
                {"layer": layer, "reading": "calibrated", "p": 100, **calibrated(*sets.values())}
            )
    layers = list(rows["layer"].unique())
    return pd.DataFrame(sorted(found, key=lambda row: (layers.index(row["layer"]), -row["p"])))


def controls(case: Subject, rows: pd.DataFrame, inferred: dict) -> pd.DataFrame:
    """Return the negative controls on the same data, a row each: name, score, low, high (99 %), n,
    passed.

    Public labels permuted (accuracy minus chance, over 20 permutations), an untrained network
    (calibrated), and one half of the unseen images calibrated with the other. Each should be 0;
    `passed` is whether its interval holds 0.
    """
    layer = case.layers[0]
    found = {"permuted public labels": _permuted(case, inferred["audited", layer, "target"])}
    if case.source:
        fresh = (part(rows, layer, "untrained", which) for which in ("audited", "unseen"))
        unseen = part(rows, layer, which="unseen")
        half = unseen["id"].isin(
            np.random.default_rng(0).permutation(sorted(set(unseen["id"])))[::2]
        )
        found["untrained network"] = calibrated(*fresh, level=CONTROLS)
        found["unseen against unseen"] = calibrated(unseen[half], unseen[~half], level=CONTROLS)
    table = pd.DataFrame([{"control": name} | row for name, row in found.items()])
    return table.assign(passed=(table["low"] <= 0) & (table["high"] >= 0))[
        ["control", "score", "low", "high", "n", "passed"]
    ]


def _permuted(case: Subject, found: dict) -> dict:
    """Return accuracy minus chance where the public labels are permuted: mean and interval over
    permutations.
    """
    labels, truth, classes = case.public.labels, case.audited.labels, len(case.public.classes)
    distances, shares, values = (
        torch.as_tensor(found["distances"]),
        np.bincount(truth, minlength=classes),
        [],
    )
    for seed in range(PERMUTATIONS):
        voted = torch.from_numpy(
            np.random.default_rng(seed).permutation(labels)[found["neighbours"]]
        )
        guess = knn.vote(voted, distances, classes).ranking[:, 0].numpy()
        chance = (shares * np.bincount(guess, minlength=classes)).sum() / len(truth) ** 2
        values.append(round((guess == truth).mean() - chance, 12))
    mean = scoring.over_seeds(values, CONTROLS)
    return {"score": mean["mean"], "low": mean["low"], "high": mean["high"], "n": len(truth)}


def verdict(case: Subject, table: pd.DataFrame, checks: pd.DataFrame, margin: float = 0.05) -> dict:
    """Return the verdict: "memorizes", "no evidence" or "undecided", the score it rests on, and
    why.

    By the 95 % interval: all above 0, the encoder memorizes; else all below `margin`, no evidence;
    else undecided. With held-out images the calibrated score decides; with a second model and none,
    the plain one; with neither, X stands in for them, and the plain and the calibrated score must
    lead to one verdict. A failed control makes every verdict "undecided". Keys: word, why,
    sentence, reading, score, low, high, margin, smallest (the effect that this n shows four times
    in five), n.
    """
    own = table[(table["layer"] == case.layers[0]) & (table["p"] == 100)].set_index("reading")
    wanted = {"held-out": ["calibrated"], "public": ["calibrated", "audited"], "": ["audited"]}[
        case.source
    ]
    wanted = ["audited"] if case.reference is not None and case.source != "held-out" else wanted
    words = {_word(own.loc[name, "low"], own.loc[name, "high"], margin) for name in wanted}
    row, failed = own.loc[wanted[0]], list(checks["control"][~checks["passed"]])
    why = (
        "control"
        if failed
        else "offset"
        if not case.source and case.reference is None
        else "disagree"
        if len(words) > 1
        else words.pop()
    )
    smallest = POWER / 1.96 * (row["high"] - row["low"]) / 2
    text = SENTENCES[why].format(
        margin=100 * margin, smallest=100 * smallest, failed=", ".join(failed)
    )
    return {
        "word": why if why in WORDS else "undecided",
        "why": why,
        "sentence": text,
        "reading": wanted[0],
        **{name: float(row[name]) for name in ("score", "low", "high")},
        "margin": margin,
        "smallest": float(smallest),
        "n": int(row["n"]),
    }


def _word(low: float, high: float, margin: float) -> str:
    return "memorizes" if low > 0 else "no evidence" if high < margin else "undecided"


def by_class(rows: pd.DataFrame, classes: tuple[str, ...], resamples: int = 500) -> pd.DataFrame:
    """Return a row per class, the highest score first: n, score with interval, and how many images
    of each kind.
    """
    found = []
    for label, group in rows.groupby("label"):
        split = scoring.four_way(group, resamples=0)
        found.append(
            {
                "class": classes[label],
                **{name: round(split[name] * split["n"]) for name in scoring.CELLS},
                **scoring.score(group, resamples=resamples),
            }
        )
    columns = ["class", "n", "score", "low", "high", "target", "reference", *scoring.CELLS]
    return pd.DataFrame(found)[columns].sort_values(["score", "n"], ascending=False, kind="stable")
