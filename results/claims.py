"""Recompute every verdict on the paper's claims from the tables of one results folder: claims.csv.

    .venv/bin/python results/claims.py study        # reads results/study, writes its claims.csv

A verdict is "supported", "contradicted", "undecided" (the interval holds the null), "withdrawn", or
"not tested". It is about new trainings where the interval is over seeds. Where scores of single
seeds were not kept, the interval is over the images of the encoders at hand, and the verdict says
"for these encoders". Nothing here computes a score: scores and intervals are read from the tables.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from results.seeds import plain  # the path comes first

HERE = Path(__file__).resolve().parent
SSL = ("vicreg", "barlow_twins", "simclr", "byol", "dino")
LATER = (
    "seeds",
    "truth",
    "sweeps",
    "references",
    "other_measures",
    "agreement",
    "atypical",
    "mitigation",
    "mitigation_backbone",
    "mitigation_seeds",
    "trained",
    "reconstruction",
    "classifier",
)  # a folder of an older run may lack them

# Two scores agree if they differ by at most this share of the two-model score. Chosen after the
# two-model scores had been seen, before the one-model scores and the set sizes were measured.
SHARE = 0.25
# Our bar for "at little cost": two points of the probe's accuracy. No source has a number.
COST = 0.02
# The default trunk of the recipe, and of the one before it.
TRUNKS = ("patch64", "small32")
# A probe that is right about all of its training images has a gap of 1 - held-out accuracy.
SATURATED = 0.99

SEEDS, IMAGES = "seeds", "images of these encoders"
SOURCES = ("abstract", "code", "follow-up", "recalled", "ours")

Tables = dict[str, pd.DataFrame]


class Finding(NamedTuple):
    """What the tables say about a claim."""

    value: str
    verdict: str
    n: int = 0
    unit: str = IMAGES
    seeds: int | None = None  # where it is not the folder's


class Claim(NamedTuple):
    """A claim, where it is from, and the function that judges it."""

    text: str
    source: str
    judge: Callable[[Tables], Finding]


NOT_RUN = Finding("not run on these seeds yet", "not tested")


def read(name: str) -> Tables:
    """Return the tables of results/<name>, at the first rho, for the projector."""
    folder = HERE / name
    tables = {
        key: pd.read_csv(folder / f"{key}.csv", dtype={"value": str})
        for key in ("scores", "shares", "differences", "fig2_probe")
    }
    for key in LATER:
        path = folder / f"{key}.csv"
        empty = not path.exists() or path.stat().st_size < 5
        table = pd.DataFrame() if empty else pd.read_csv(path, dtype={"value": str})
        tables[key] = table.rename(columns={"knob": "setting"})  # its name in older tables

    for key in ("scores", "sweeps"):
        tables[key] = plain(tables[key])

    rho = tables["scores"]["rho"].iloc[0]
    for key in ("scores", "shares", "differences"):
        table = tables[key]
        tables[key] = table[(table["rho"] == rho) | table["rho"].isna()]
    tables["scores"] = tables["scores"].query("layer == 'projector'")
    return tables


def number(row, value: str = "score", form: str = "+.3f") -> str:
    """Return a value with its interval, from the columns `value`, low and high."""
    return f"{row[value]:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def verdict(rows: pd.DataFrame, null: float = 0.0) -> str:
    """Return the verdict on a claim that every row must show; a row that shows the opposite
    contradicts it.
    """
    if (rows["low"] > null).all():
        return "supported"
    if (rows["high"] < null).any():
        return "contradicted"
    return "undecided"


def within(rows: pd.DataFrame, margin: float) -> str:
    """Return the verdict on a claim that every row's value lies within ± margin."""
    inside = (rows["low"] >= -margin) & (rows["high"] <= margin)
    outside = (rows["low"] > margin) | (rows["high"] < -margin)
    if inside.all():
        return "supported"
    return "contradicted" if outside.any() else "undecided"


def by_seed(tables: Tables, quantity: str, criteria) -> pd.DataFrame:
    """Return the rows of seeds.csv for a quantity: criterion, mean, low, high over seeds."""
    table = tables.get("seeds", pd.DataFrame())
    if table.empty:
        return table
    return table[(table["quantity"] == quantity) & table["criterion"].isin(list(criteria))]


def best_unit(
    tables: Tables, rows: pd.DataFrame, quantity: str, value: str
) -> tuple[pd.DataFrame, str]:
    """Return the rows with intervals over seeds if every criterion has one, else as they are; and
    the unit.
    """
    seeds = by_seed(tables, quantity, rows["criterion"])
    if len(seeds) < len(rows) or rows.empty:
        return rows, IMAGES
    seeds = seeds.set_index("criterion").loc[list(rows["criterion"])]
    rows = rows.copy()
    for column, of_seeds in ((value, "mean"), ("low", "low"), ("high", "high")):
        rows[column] = seeds[of_seeds].to_numpy()
    return rows, SEEDS


def listed(rows: pd.DataFrame, value: str = "score", form: str = "+.3f") -> str:
    """Return "criterion value [low, high]" of each row."""
    from dejavu_utils.plots import NAMES

    return "; ".join(
        f"{NAMES[row['criterion']]} {number(row, value, form)}" for _, row in rows.iterrows()
    )


def over(unit: str) -> str:
    """Return how a sentence names the unit of its intervals."""
    return "over seeds" if unit == SEEDS else "over images"


def at_the_end(tables: Tables) -> pd.DataFrame:
    """Return the scores of the last epoch."""
    scores = tables["scores"]
    return scores[scores["epoch"] == scores["epoch"].max()]


def steps(tables: Tables, what: str, criteria=SSL) -> pd.DataFrame:
    """Return the rows of differences.csv for one difference."""
    rows = tables["differences"]
    return rows[(rows["what"] == what) & rows["criterion"].isin(criteria)]


def exists(tables: Tables) -> Finding:
    """P1."""
    end = at_the_end(tables).query("criterion == 'vicreg' and p == 100")
    over_seeds, unit = best_unit(tables, end, "score", "score")
    rise = steps(tables, "p = 20 % - all", ("vicreg",)).assign(
        score=lambda frame: frame["difference"]
    )
    value = (
        f"all {number(over_seeds.iloc[0])} {over(unit)}; p = 20 % − all {number(rise.iloc[0])} "
        "over images"
    )
    return Finding(value, verdict(pd.concat([over_seeds, rise])), int(end["n"].iloc[0]))


def split(tables: Tables) -> Finding:
    """P2."""
    rows = tables["shares"][tables["shares"]["epoch"] == tables["shares"]["epoch"].max()]
    rows = rows[rows["criterion"] == "vicreg"]
    rows = rows.assign(low=rows["ratio_low"], high=rows["ratio_high"])
    value = f"ratio {number(rows.iloc[0], 'ratio', '.2f')} over images"
    return Finding(value, verdict(rows, 1.0), int(rows["n"].iloc[0]))


def grows(tables: Tables) -> Finding:
    """P3."""
    what = "last - first trained"
    step = steps(tables, what, ("vicreg",))
    n = int(step["n"].iloc[0])
    step, unit = best_unit(tables, step, what, "difference")

    checkpoints = tables["scores"].query("criterion == 'vicreg' and p == 100").sort_values("epoch")
    order = checkpoints["epoch"].corr(checkpoints["score"], method="spearman")
    found = verdict(step)
    if found == "supported" and order <= 0.8:
        found = "undecided"
    value = (
        f"last − first trained {number(step.iloc[0], 'difference')} {over(unit)}; Spearman "
        f"{order:.2f} over {len(checkpoints)} checkpoints"
    )
    return Finding(value, found, n, unit)


def probe(tables: Tables) -> Finding:
    """P4: withdrawn where the probe is right about all of its training images."""
    table = tables["fig2_probe"].query("criterion == 'vicreg'")
    by_epoch = table.pivot(index="epoch", columns="quantity", values="mean").sort_index()
    gap = by_epoch["train - held-out gap"]
    n = int(table["n_held_out"].iloc[0])

    in_training = by_epoch["held-out accuracy"] + gap
    if in_training.min() >= SATURATED:
        value = (
            f"the probe's accuracy on its training images is at least {in_training.min():.3f} at "
            f"all {len(gap)} checkpoints, so the gap is 1 − held-out accuracy and says nothing"
        )
        return Finding(value, "withdrawn", n)

    scores = tables["scores"].query("criterion == 'vicreg' and p == 100")
    together = scores.set_index("epoch")["score"].corr(gap)
    ends = table[(table["quantity"] == "train - held-out gap") & (table["epoch"] > 0)]
    ends = ends.sort_values("epoch")
    first, last = ends.iloc[0], ends.iloc[-1]
    found = "undecided"
    if together <= 0:
        found = "supported"
    elif last["low"] > first["high"]:
        found = "contradicted"
    value = (
        f"gap, over seeds, {number(first, 'mean')} → {number(last, 'mean')} from the first trained "
        f"checkpoint to the last; correlation with the score over {len(gap)} checkpoints "
        f"{together:+.2f}; the probe was trained {_trained_on(table)}"
    )
    return Finding(value, found, n)


def _trained_on(table: pd.DataFrame) -> str:
    """Return what the probe was trained on; tables of older runs do not say: on the images."""
    views = int(table["views"].iloc[0]) if "views" in table else 0
    if views:
        return f"on {views} augmented views of each image, as the authors' is on views"
    return "without augmentation, unlike the authors'"


def layer(tables: Tables) -> Finding:
    """P5."""
    what = "projector - backbone"
    rows = steps(tables, what)
    n = int(rows["n"].iloc[0])
    rows, unit = best_unit(tables, rows, what, "difference")
    value = f"{over(unit)}: {listed(rows, 'difference')}"
    single = by_seed(tables, what, SSL) if unit == IMAGES else pd.DataFrame()
    if len(single):
        value += f"; over seeds: {listed(single, 'mean')}"
    return Finding(value, verdict(rows), n, unit)


def supervised(tables: Tables) -> Finding:
    """P6."""
    texts, every, units = [], [], []
    for kind in ("logits", "projector"):
        what = f"- supervised ({kind})"
        rows = steps(tables, what)
        if rows.empty:
            continue
        n = int(rows["n"].iloc[0])
        rows, unit = best_unit(tables, rows, what, "difference")
        texts.append(f"against its {kind}, {over(unit)}: {listed(rows, 'difference')}")
        every.append(rows)
        units.append(unit)
    if not every:
        return NOT_RUN
    unit = IMAGES if IMAGES in units else SEEDS
    caveat = "label inference is the supervised loss on crops, so it favours that baseline"
    return Finding("; ".join([*texts, caveat]), verdict(pd.concat(every)), n, unit)


def several(tables: Tables) -> Finding:
    """P7."""
    rows = at_the_end(tables).query("p == 20 and criterion in @SSL[:4]")
    if len(rows) < 3:
        return NOT_RUN
    shown = int((rows["low"] > 0).sum())
    found = "undecided"
    if shown >= 3:
        found = "supported"
    elif shown <= 1:
        found = "contradicted"
    value = f"{shown} of {len(rows)} above 0 at p = 20 %, over images: {listed(rows)}"
    return Finding(value, found, int(rows["n"].iloc[0]))


def setting(tables: Tables, name: str, criterion: str, table: str = "mitigation") -> pd.DataFrame:
    """Return the rows of a setting, the score's change as low and high; none if it was not run."""
    rows = tables[table]
    if rows.empty:
        return rows
    rows = rows[(rows["criterion"] == criterion) & (rows["setting"] == name)]
    return rows.assign(low=rows["score_change_low"], high=rows["score_change_high"])


def unit_of(rows: pd.DataFrame) -> str:
    """Return the unit of the intervals in a table of settings, from its column `over`."""
    return SEEDS if "over" in rows and (rows["over"] == "seeds").all() else IMAGES


def invariance(tables: Tables) -> Finding:
    """P8."""
    rows = setting(tables, "constants.invariance", "vicreg")
    if rows.empty:
        return NOT_RUN
    probed = setting(tables, "constants.invariance", "vicreg", "mitigation_backbone")
    row = rows[rows["value"].astype(float) == 100].iloc[0]
    useful = probed[probed["value"].astype(float) == 100].iloc[0]
    cost = {
        "change": useful["held_out_change"],
        "low": useful["held_out_change_low"],
        "high": useful["held_out_change_high"],
    }

    found = "undecided"
    if row["high"] < 0 and cost["low"] >= -COST:
        found = "supported"
    elif row["low"] > 0 or cost["high"] < -COST:
        found = "contradicted"
    unit = unit_of(rows)
    value = (
        f"λ = 100 against 25, {over(unit)}: score {number(row, 'score_change')}, probe on the "
        f"backbone {number(cost, 'change')} (little cost: {100 * COST:.0f} points at most, our bar)"
    )
    return Finding(value, found, int(row["n"]), unit)


def temperature(tables: Tables) -> Finding:
    """P9: values are permuted within each seed; the statistic is the range of their mean scores."""
    rows = setting(tables, "constants.temperature", "simclr")
    if rows.empty or rows["seeds"].iloc[0] < 2:
        return NOT_RUN
    single = tables["mitigation_seeds"]
    single = single.query("criterion == 'simclr' and setting == 'constants.temperature'")
    scores = single.pivot(index="seed", columns="value", values="score")  # (seeds, values)

    found = np.ptp(scores.to_numpy().mean(0))
    orders = [list(itertools.permutations(row)) for row in scores.to_numpy().tolist()]
    ranges = np.array([np.ptp(np.mean(one, 0)) for one in itertools.product(*orders)])
    chance = float((ranges >= found - 1e-12).mean())

    text = ", ".join(f"τ = {value} {mean:+.3f}" for value, mean in scores.mean().items())
    value = f"{text}; range {found:.3f}, permuted within seeds p = {chance:.3f}"
    judged = "supported" if chance < 0.05 else "undecided"
    return Finding(value, judged, int(rows["n"].iloc[0]), SEEDS)


def size(tables: Tables, name: str = "trained", fixed: str = "epochs") -> Finding:
    """P10, at as many epochs (the paper's way: more steps) or as many steps."""
    rows = setting(tables, name, "vicreg", "trained")
    if rows.empty:
        return NOT_RUN
    first, last = rows.iloc[0], rows.iloc[-1]
    margin = SHARE * abs(first["score"])
    unit = unit_of(rows)
    value = (
        f"{last['value']} images a class against {first['value']}, as many {fixed}: score "
        f"{first['score']:+.3f} → {last['score']:+.3f}, change {number(last, 'score_change')} "
        f"{over(unit)}; constant is an interval within ±{margin:.3f}"
    )
    return Finding(value, within(rows.tail(1), margin), int(last["n"]), unit)


def trunk_width(name: str) -> int:
    """Return the width of a small trunk: 32 of "small32"."""
    return int(re.sub(r"\D", "", name))


def width(tables: Tables) -> Finding:
    """P12."""
    rows = setting(tables, "encoder", "vicreg")
    if rows.empty:
        return NOT_RUN

    defaults = rows[rows["value"].isin(TRUNKS)]
    default = defaults["value"].iloc[0]
    rows = rows[rows["value"] != default]
    narrower = rows["value"].map(trunk_width) < trunk_width(default)
    larger = rows.assign(
        low=rows["low"].where(~narrower, -rows["high"]),
        high=rows["high"].where(~narrower, -rows["low"]),
    )
    unit = unit_of(rows)
    text = "; ".join(f"{row['value']} {number(row, 'score_change')}" for _, row in rows.iterrows())
    value = f"score against the default width {trunk_width(default)}, {over(unit)}: {text}"
    return Finding(value, verdict(larger), int(rows["n"].iloc[0]), unit)


def corner(tables: Tables) -> Finding:
    """P11."""
    if tables["sweeps"].empty:
        return NOT_RUN
    rows = tables["sweeps"].query("sweep == 'fraction' and value == '0.3' and p == 100")
    value = f"share .3 of each side: {number(rows.iloc[0])} over images"
    return Finding(value, verdict(rows), int(rows["n"].iloc[0]))


def neighbours(tables: Tables) -> Finding:
    """P13."""
    if tables["sweeps"].empty:
        return NOT_RUN
    rows = tables["sweeps"].query("sweep == 'k' and p == 100")
    rows = rows[rows["value"].astype(float) >= 5]
    text = "; ".join(f"k = {row['value']} {number(row)}" for _, row in rows.iterrows())
    return Finding(f"over images: {text}", verdict(rows), int(rows["n"].iloc[0]))


def plain_one_model(tables: Tables) -> pd.DataFrame:
    """Return plain one-model − two-model scores: criterion, reference, difference, low, high.

    The interval is the paired one where the table has it (`paired`). Tables of older runs do not:
    then it is the widest possible, half its width is the sum of the two scores' half widths.
    """
    table = tables["references"]
    two = table[table["reference"] == "two-model"].set_index("criterion")
    rows = table[table["reference"].isin(["resnet", "naive_bayes"])]
    other = two.loc[rows["criterion"]].reset_index()
    rows = rows.reset_index(drop=True)
    difference = rows["score"] - other["score"]
    half = (rows["high"] - rows["low"] + other["high"] - other["low"]) / 2
    low, high = difference - half, difference + half
    paired = "minus_two_model" in rows
    if paired:
        low, high = rows["minus_two_model_low"], rows["minus_two_model_high"]
    return pd.DataFrame(
        {
            "criterion": rows["criterion"],
            "reference": rows["reference"],
            "one": rows["score"],
            "two": other["score"],
            "difference": difference,
            "low": low,
            "high": high,
            "paired": paired,
            "n": rows["n"],
        }
    )


def one_model(tables: Tables) -> Finding:
    """P14, on the plain one-model score: the calibrated one cancels its classifier."""
    if tables["references"].empty:
        return NOT_RUN
    rows = plain_one_model(tables).query("criterion == 'vicreg'")
    two = rows["two"].iloc[0]
    margin = SHARE * abs(two)
    text = "; ".join(
        f"{row['reference'].replace('_', ' ')} {number(row, 'difference')}"
        for _, row in rows.iterrows()
    )
    kind = "paired" if rows["paired"].all() else "widest possible"
    value = (
        f"plain one-model score minus two-model score, which is {two:+.3f}, {kind} "
        f"interval over images: {text}; agreement is an interval within ±{margin:.3f}"
    )
    return Finding(value, within(rows, margin), int(rows["n"].iloc[0]))


def again(tables: Tables) -> Finding:
    """P15."""
    rows = tables["agreement"]
    if len(rows):
        rows = rows.query(
            "criterion == 'vicreg' and reference == 'start 1' and what == 'memorized'"
        )
    if rows.empty:
        return Finding("needs a second training on the same images (more.starts=2)", "not tested")
    row = rows.iloc[0]
    text = [
        f"{name} {row[key]:.2f} [{row[f'{key}_low']:.2f}, {row[f'{key}_high']:.2f}]"
        for key, name in (
            ("odds", "odds ratio"),
            ("control_odds", "among images of neither set"),
            ("net", "their quotient"),
        )
    ]
    both = rows.assign(low=rows[["odds_low", "net_low"]].min(axis=1), high=rows["odds_high"])
    return Finding(f"over images: {', '.join(text)}", verdict(both, 1.0), int(row["n"]))


def outliers(tables: Tables) -> Finding:
    """P16."""
    if tables["atypical"].empty:
        return NOT_RUN
    row = tables["atypical"].iloc[0]
    net = {"score": row["net"], "low": row["net_low"], "high": row["net_high"]}
    value = (
        f"top minus bottom tenth by alignment gap, over images: {number(row, 'difference')}, net "
        f"of images of neither set {number(net)}"
    )
    return Finding(value, verdict(pd.DataFrame([net])), int(row["n"]))


def members(tables: Tables) -> Finding:
    """P17."""
    if tables["other_measures"].empty:
        return NOT_RUN
    table = tables["other_measures"].set_index("statistic")
    text = "; ".join(
        f"{name.replace('_', ' ')} {number(table.loc[name], 'auc', '.3f')}"
        for name in ("confidence_gap", "correct_gap", "alignment_gap", "similarity_gap")
    )
    rows = table.loc[["confidence_gap"]]
    return Finding(f"AUC over images: {text}", verdict(rows, 0.5), int(rows["n"].iloc[0]))


def truth(tables: Tables) -> Finding:
    """P18."""
    rows = tables["truth"]
    rows = rows.query("rho == 0") if len(rows) else rows
    if rows.empty:
        return Finding("no set with rho = 0", "not tested")
    row = rows.iloc[0]
    value = (
        f"over images: target {row['target']:.3f} [{row['target_low']:.3f}, "
        f"{row['target_high']:.3f}], Bayes {row['bayes']:.2f}; more images at fixed steps: P10b"
    )
    found = "supported" if row["target_low"] > row["bayes"] else "undecided"
    return Finding(value, found, int(row["n"]))


def reconstructed(tables: Tables) -> Finding:
    """P19: the second attribute is claimed; whole pictures say whether it could be read at all."""
    rows = tables["reconstruction"]
    if rows.empty:
        return NOT_RUN
    rows = rows[rows["condition"] == "projector"]
    attacked = rows[rows["attacked"] == "attacked"].set_index("measure")
    text = "; ".join(f"{name} {number(attacked.loc[name])}" for name in ("class", "attribute"))
    value = f"read off drawings, target minus reference, over images: {text}"

    whole = rows[rows["attacked"] == "whole"].set_index("measure")
    if "attribute" in whole.index:
        ceiling = whole.loc["attribute", ["target", "reference"]]
        value += (
            f"; little power: off drawings of whole pictures it is read at {ceiling.iloc[0]:.3f} "
            f"and {ceiling.iloc[1]:.3f}, chance .5"
        )
    n = int(attacked.loc["attribute", "n"])
    trained = len(tables["classifier"]) // 2  # a classifier of class and of attribute for each seed
    return Finding(value, verdict(attacked.loc[["attribute"]]), n, seeds=trained)


CLAIMS = {
    "P1": Claim(
        "déjà vu exists, and is larger among the most confident (VICReg)",
        "abstract; the second half recalled",
        exists,
    ),
    "P2": Claim(
        "memorized images are more frequent than misrepresented ones (VICReg)",
        "code; direction recalled",
        split,
    ),
    "P3": Claim("the score grows with training (VICReg)", "code; direction recalled", grows),
    "P4": Claim(
        "the probe's train–held-out gap does not reveal it (VICReg)",
        "abstract, of conventional techniques; the gap recalled",
        probe,
    ),
    "P5": Claim(
        "the projector scores above the backbone, for every criterion",
        "code; direction recalled",
        layer,
    ),
    "P6": Claim(
        "every self-supervised criterion scores above the supervised baseline",
        "code; direction recalled",
        supervised,
    ),
    "P7": Claim(
        "several criteria show it (at least 3 of VICReg, Barlow Twins, SimCLR, BYOL)",
        "abstract",
        several,
    ),
    "P8": Claim(
        "a larger invariance coefficient lowers the score at little cost (VICReg)",
        "code; direction recalled; the bar ours",
        invariance,
    ),
    "P9": Claim("the temperature matters (SimCLR)", "code; no direction known", temperature),
    "P10a": Claim(
        "the score hardly depends on the size of the training set, at fixed epochs (VICReg)",
        "recalled; a follow-up's abstract points the other way",
        size,
    ),
    "P10b": Claim(
        "the same at fixed steps, so that each image is seen less often",
        "ours",
        functools.partial(size, name="trained_steps", fixed="steps"),
    ),
    "P11": Claim("corner crops show it too (VICReg)", "code; direction recalled", corner),
    "P12": Claim("larger models score higher (VICReg)", "ours; no direction known", width),
    "P13": Claim("the sign does not depend on k (VICReg)", "ours; no direction known", neighbours),
    "P14": Claim(
        "a one-model test agrees with the two-model test (VICReg)", "follow-up", one_model
    ),
    "P15": Claim(
        "an image memorized under one seed is memorized under another (VICReg)", "ours", again
    ),
    "P16": Claim("atypical images are memorized more (VICReg)", "follow-up", outliers),
    "P17": Claim("the confidence gap tells members from others (VICReg)", "ours", members),
    "P18": Claim("at ρ = 0 the target exceeds the known Bayes accuracy (VICReg)", "ours", truth),
    "P19": Claim(
        "reconstructions share more than the class: the second attribute (VICReg)",
        "ours, after a figure of the paper",
        reconstructed,
    ),
}


def table(name: str) -> pd.DataFrame:
    """Return a row per claim: id, claim, source, value, unit, n, seeds, verdict."""
    tables = read(name)
    seeds = int(tables["scores"]["seeds"].iloc[0])
    rows = []
    for key, claim in CLAIMS.items():
        found = claim.judge(tables)
        decided = found.verdict in ("supported", "contradicted")
        suffix = " for these encoders" if decided and found.unit == IMAGES else ""
        rows.append(
            {
                "id": key,
                "claim": claim.text,
                "source": claim.source,
                "value": found.value,
                "unit": found.unit if found.n and found.verdict != "withdrawn" else "",
                "n": found.n,
                "seeds": (found.seeds or seeds) if found.n else 0,
                "verdict": found.verdict + suffix,
            }
        )
    return pd.DataFrame(rows)


def write(name: str) -> pd.DataFrame:
    """Write claims.csv of a folder and return it."""
    judged = table(name)
    judged.to_csv(HERE / name / "claims.csv", index=False)
    return judged


if __name__ == "__main__":
    judged = write(sys.argv[1])
    print(judged[["id", "verdict", "unit", "value"]].to_string(index=False))
