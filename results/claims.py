"""The paper's claims, each with our number and a verdict, from the tables of one results folder:
its claims.csv.

    .venv/bin/python results/claims.py study        # reads results/study, writes
    results/study/claims.csv

A verdict is "supported", "contradicted", "undecided" (the interval holds the null), or "not tested"
with its reason. Nothing here computes a score or an interval: they are read from the tables that
the notebooks wrote.
"""

from __future__ import annotations

import functools
import itertools
import sys
from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).resolve().parent
SSL = ("vicreg", "barlow_twins", "simclr", "byol", "dino")
LATER = (
    "truth",
    "sweeps",
    "references",
    "agreement",
    "companions",
    "atypical",
    "mitigation",
    "mitigation_backbone",
    "mitigation_seeds",
    "trained",
    "reconstruction",
    "judge",
)  # a folder of an older run may lack them
# two scores agree if they differ by no more of the two-model score: fixed before anything was
# measured
SHARE = 0.25
NOT_RUN = ("not run on these seeds yet", "not tested", 0)


def _read(name: str) -> dict[str, pd.DataFrame]:
    tables = {
        key: pd.read_csv(HERE / name / f"{key}.csv", dtype={"value": str})
        for key in ("scores", "shares", "differences", "fig2_probe")
    }
    for key in LATER:
        path = HERE / name / f"{key}.csv"
        empty = not path.exists() or path.stat().st_size < 5
        tables[key] = pd.DataFrame() if empty else pd.read_csv(path, dtype={"value": str})
    rho = tables["scores"]["rho"].iloc[0]
    for key in ("scores", "shares", "differences"):
        tables[key] = tables[key][(tables[key]["rho"] == rho) | tables[key]["rho"].isna()]
    tables["scores"] = tables["scores"].query("layer == 'projector' and ranking == 'own'")
    return tables


def _number(row, value: str = "score", form: str = "+.3f") -> str:
    return f"{row[value]:{form}} [{row['low']:{form}}, {row['high']:{form}}]"


def _all(rows, null: float = 0.0) -> str:
    """Return the verdict on a claim that every row must show; one row that shows the opposite
    contradicts it.
    """
    if (rows["low"] > null).all():
        return "supported"
    return "contradicted" if (rows["high"] < null).any() else "undecided"


def _end(tables) -> pd.DataFrame:
    scores = tables["scores"]
    return scores[scores["epoch"] == scores["epoch"].max()]


def _listed(rows, value: str = "score", form: str = "+.3f") -> str:
    from dejavu_utils.plots import NAMES

    return "; ".join(
        f"{NAMES[row['criterion']]} {_number(row, value, form)}" for _, row in rows.iterrows()
    )


def _steps(tables, what: str, criteria=SSL) -> pd.DataFrame:
    rows = tables["differences"][tables["differences"]["what"] == what]
    return rows[rows["criterion"].isin(criteria)]


def exists(tables):
    """P1."""
    end = _end(tables).query("criterion == 'vicreg' and p == 100")
    rise = _steps(tables, "p = 20 % - all", ("vicreg",)).assign(
        score=lambda frame: frame["difference"]
    )
    both = pd.concat([end, rise])
    return (
        f"all {_number(end.iloc[0])}, p = 20 % − all {_number(rise.iloc[0])}",
        _all(both),
        int(end["n"].iloc[0]),
    )


def split(tables):
    """P2."""
    rows = tables["shares"][tables["shares"]["epoch"] == tables["shares"]["epoch"].max()]
    rows = rows[rows["criterion"] == "vicreg"].assign(
        low=rows["ratio_low"], high=rows["ratio_high"]
    )
    return f"ratio {_number(rows.iloc[0], 'ratio', '.2f')}", _all(rows, 1.0), int(rows["n"].iloc[0])


def grows(tables):
    """P3."""
    step = _steps(tables, "last - first trained", ("vicreg",))
    over = tables["scores"].query("criterion == 'vicreg' and p == 100").sort_values("epoch")
    order = over["epoch"].corr(over["score"], method="spearman")
    verdict = (
        _all(step)
        if order > 0.8
        else "undecided"
        if _all(step) != "contradicted"
        else "contradicted"
    )
    return (
        (
            f"Spearman {order:.2f} over {len(over)} checkpoints, last − first trained "
            f"{_number(step.iloc[0], 'difference')}"
        ),
        verdict,
        int(step["n"].iloc[0]),
    )


def probe(tables):
    """P4."""
    gap = tables["fig2_probe"].query("criterion == 'vicreg' and quantity == 'train - held-out gap'")
    gap = gap.sort_values("epoch")
    trained = gap[gap["epoch"] > 0]
    first, last = trained.iloc[0], trained.iloc[-1]
    scores = (
        tables["scores"].query("criterion == 'vicreg' and p == 100").set_index("epoch")["score"]
    )
    together = scores.corr(gap.set_index("epoch")["mean"])
    verdict = (
        "supported"
        if together <= 0
        else "undecided"
        if last["low"] <= first["high"]
        else "contradicted"
    )
    return (
        (
            f"gap {first['mean']:+.3f} → {last['mean']:+.3f} from the first trained checkpoint to "
            "the last; its "
            f"correlation with the score over checkpoints {together:+.2f}"
        ),
        verdict,
        int(gap["n_held_out"].iloc[0]),
    )


def layer(tables):
    """P5."""
    rows = _steps(tables, "projector - backbone")
    return _listed(rows, "difference"), _all(rows), int(rows["n"].iloc[0])


def supervised(tables):
    """P6."""
    rows = pd.concat(
        [
            _steps(tables, f"- supervised ({kind})").assign(kind=kind)
            for kind in ("projector", "logits")
        ]
    )
    if not len(rows):
        return NOT_RUN
    text = "; ".join(
        f"against its {kind}: {_listed(part, 'difference')}" for kind, part in rows.groupby("kind")
    )
    return text, _all(rows), int(rows["n"].iloc[0])


def several(tables):
    """P7."""
    rows = _end(tables).query("p == 20 and criterion in @SSL[:4]")
    if len(rows) < 3:
        return NOT_RUN
    shown = int((rows["low"] > 0).sum())
    verdict = (
        "supported"
        if shown >= 3
        else "contradicted"
        if (rows["low"] > 0).sum() <= 1
        else "undecided"
    )
    return (
        f"{shown} of {len(rows)} above 0 at p = 20 %: {_listed(rows)}",
        verdict,
        int(rows["n"].iloc[0]),
    )


def _knob(tables, name: str, criterion: str, table: str = "mitigation"):
    """Return the rows of a knob with the change of the score as `low` and `high`; none where it was
    not turned.
    """
    rows = tables[table]
    rows = rows[(rows["criterion"] == criterion) & (rows["knob"] == name)] if len(rows) else rows
    return (
        rows.assign(low=rows["score_change_low"], high=rows["score_change_high"])
        if len(rows)
        else rows
    )


def invariance(tables):
    """P8."""
    rows, probed = (
        _knob(tables, "constants.invariance", "vicreg", f"mitigation{end}")
        for end in ("", "_backbone")
    )
    rows, probed = (
        ([one[one["value"].astype(float) == 100] for one in (rows, probed)])
        if len(rows)
        else (rows, probed)
    )
    if not len(rows):
        return NOT_RUN
    row, useful = rows.iloc[0], probed.iloc[0]
    cost = {
        "held_out": useful["held_out_change"],
        "low": useful["held_out_change_low"],
        "high": useful["held_out_change_high"],
    }
    opposite = row["low"] > 0 or cost["high"] < -0.02
    verdict = (
        "supported"
        if row["high"] < 0 and cost["low"] >= -0.02
        else "contradicted"
        if opposite
        else "undecided"
    )
    return (
        (
            f"λ = 100 against 25: score {_number(row, 'score_change')}, probe on the backbone "
            f"{_number(cost, 'held_out')} (2 points at most were claimed)"
        ),
        verdict,
        int(row["n"]),
    )


def temperature(tables):
    """P9: values are permuted within each seed; the statistic is the range of their mean scores."""
    rows, seeds = _knob(tables, "constants.temperature", "simclr"), tables["mitigation_seeds"]
    if not len(rows) or rows["seeds"].iloc[0] < 2:
        return NOT_RUN
    wide = seeds.query("criterion == 'simclr' and knob == 'constants.temperature'")
    wide = wide.pivot(index="seed", columns="value", values="score")
    every = itertools.product(
        *(list(itertools.permutations(row)) for row in wide.to_numpy().tolist())
    )
    found = np.ptp(wide.to_numpy().mean(0))
    ranges = np.array([np.ptp(np.mean(one, 0)) for one in every])
    chance = float((ranges >= found - 1e-12).mean())
    text = ", ".join(f"τ = {value} {mean:+.3f}" for value, mean in wide.mean().items())
    return (
        f"{text}; range {found:.3f}, permuted within seeds p = {chance:.3f}",
        "supported" if chance < 0.05 else "undecided",
        int(rows["n"].iloc[0]),
    )


def size(tables, knob: str = "trained", fixed: str = "epochs"):
    """P10, at as many epochs (the paper's way: more steps) or as many steps."""
    rows = _knob(tables, knob, "vicreg", "trained")
    if not len(rows):
        return NOT_RUN
    first, last = rows.iloc[0], rows.iloc[-1]
    margin = SHARE * abs(first["score"])
    inside, outside = (
        last["low"] >= -margin and last["high"] <= margin,
        last["low"] > margin or last["high"] < -margin,
    )
    verdict = "supported" if inside else "contradicted" if outside else "undecided"
    return (
        (
            f"{last['value']} images a class against {first['value']}, as many {fixed}: score "
            f"{first['score']:+.3f} → "
            f"{last['score']:+.3f}, change {_number(last, 'score_change')}; constant is an "
            "interval within "
            f"±{margin:.3f}"
        ),
        verdict,
        int(last["n"]),
    )


def width(tables):
    """P12."""
    rows = _knob(tables, "encoder", "vicreg")
    rows = rows[rows["value"] != "small32"] if len(rows) else rows
    if not len(rows):
        return NOT_RUN
    grows = [
        row["high"] < 0 if row["value"] == "small16" else row["low"] > 0
        for _, row in rows.iterrows()
    ]
    falls = [
        row["low"] > 0 if row["value"] == "small16" else row["high"] < 0
        for _, row in rows.iterrows()
    ]
    text = "; ".join(f"{row['value']} {_number(row, 'score_change')}" for _, row in rows.iterrows())
    return (
        f"score against the default width 32: {text}",
        "supported" if all(grows) else "contradicted" if any(falls) else "undecided",
        int(rows["n"].iloc[0]),
    )


def corner(tables):
    """P11."""
    if not len(tables["sweeps"]):
        return NOT_RUN
    rows = tables["sweeps"].query(
        "sweep == 'fraction' and value == '0.3' and p == 100 and top == 1"
    )
    return f"share .3 of each side: {_number(rows.iloc[0])}", _all(rows), int(rows["n"].iloc[0])


def neighbours(tables):
    """P13."""
    if not len(tables["sweeps"]):
        return NOT_RUN
    rows = tables["sweeps"].query("sweep == 'k' and p == 100 and top == 1")
    rows = rows[rows["value"].astype(float) >= 5]
    text = "; ".join(f"k = {row['value']} {_number(row)}" for _, row in rows.iterrows())
    return text, _all(rows), int(rows["n"].iloc[0])


def one_model(tables):
    """P14."""
    table = tables["references"]
    if not len(table):
        return NOT_RUN
    table = table.assign(best=table["calibrated"].fillna(table["score"]))
    over = table.pivot(index="criterion", columns="reference", values="best").corr(
        method="spearman"
    )["two-model"]
    rows = table[table["criterion"] == "vicreg"].set_index("reference")
    two, rows = (
        rows.loc["two-model"],
        rows.loc[["resnet", "naive_bayes"]].dropna(subset="difference"),
    )
    rows = rows.assign(low=rows["difference_low"], high=rows["difference_high"])
    margin = SHARE * abs(two["score"])
    inside, outside = (
        rows[["low", "high"]].abs().le(margin),
        (rows["low"] > margin) | (rows["high"] < -margin),
    )
    verdict = (
        "supported" if inside.all(axis=None) else "contradicted" if outside.any() else "undecided"
    )
    text = [
        f"{kind.replace('_', ' ')} {_number(row, 'difference')}, rank correlation over criteria "
        f"{over[kind]:.2f}"
        for kind, row in rows.iterrows()
    ]
    return (
        (
            f"calibrated minus two-model score, which is {_number(two)}: {'; '.join(text)}; "
            "agreement is an interval "
            f"within ±{margin:.3f}"
        ),
        verdict,
        int(two["n"]),
    )


def again(tables):
    """P15."""
    rows = tables["agreement"]
    if len(rows):
        rows = rows.query(
            "criterion == 'vicreg' and reference == 'start 1' and what == 'memorized'"
        )
    if not len(rows):
        return "needs a second training on the same images (more.starts=2)", "not tested", 0
    row = rows.iloc[0]
    text = [
        f"{name} {row[key]:.2f} [{row[f'{key}_low']:.2f}, {row[f'{key}_high']:.2f}]"
        for key, name in (
            ("odds", "odds ratio"),
            ("control_odds", "among images of neither set"),
            ("net", "their quotient"),
        )
    ]
    verdict = _all(
        rows.assign(low=rows[["odds_low", "net_low"]].min(axis=1), high=rows["odds_high"]), 1.0
    )
    return ", ".join(text), verdict, int(row["n"])


def outliers(tables):
    """P16."""
    if not len(tables["atypical"]):
        return NOT_RUN
    row = tables["atypical"].iloc[0]
    net = {"score": row["net"], "low": row["net_low"], "high": row["net_high"]}
    return (
        (
            f"top minus bottom tenth by alignment gap {_number(row, 'difference')}, net of images "
            "of neither set "
            f"{_number(net)}"
        ),
        _all(pd.DataFrame([net])),
        int(row["n"]),
    )


def members(tables):
    """P17."""
    if not len(tables["companions"]):
        return NOT_RUN
    table = tables["companions"].set_index("statistic")
    text = "; ".join(
        f"{name.replace('_', ' ')} {_number(table.loc[name], 'auc', '.3f')}"
        for name in ("confidence_gap", "correct_gap", "alignment_gap", "similarity_gap")
    )
    return (
        f"AUC: {text}",
        _all(table.loc[["confidence_gap"]], 0.5),
        int(table.loc["confidence_gap", "n"]),
    )


def truth(tables):
    """P18."""
    rows = tables["truth"].query("rho == 0") if len(tables["truth"]) else tables["truth"]
    if not len(rows):
        return "no set with rho = 0", "not tested", 0
    row = rows.iloc[0]
    value = (
        f"target {row['target']:.3f} [{row['target_low']:.3f}, {row['target_high']:.3f}], "
        f"Bayes {row['bayes']:.2f}"
    )
    verdict = "supported" if row["target_low"] > row["bayes"] else "undecided"
    return f"{value}; more images at fixed steps: see P10b", verdict, int(row["n"])


def reconstructed(tables):
    """P19: the class is the condition for it to mean anything; the second attribute is what is
    claimed.
    """
    rows = tables["reconstruction"]
    if not len(rows):
        return NOT_RUN
    rows = rows.query("condition == 'projector' and attacked == 'attacked'").set_index("measure")
    text = "; ".join(f"{name} {_number(rows.loc[name])}" for name in ("class", "attribute"))
    return (
        f"read off drawings by a judge, target minus reference: {text}",
        _all(rows.loc[["attribute"]]),
        int(rows.loc["attribute", "n"]),
        len(tables["judge"]) // 2,
    )  # a judge of class and attribute for each seed


CLAIMS = {
    "P1": ("déjà vu exists, and is larger among the most confident (VICReg)", exists),
    "P2": ("memorized images are more frequent than misrepresented ones (VICReg)", split),
    "P3": ("the score grows with training (VICReg)", grows),
    "P4": ("the probe's train–held-out gap does not reveal it (VICReg)", probe),
    "P5": ("the projector scores above the backbone, for every criterion", layer),
    "P6": ("every self-supervised criterion scores above the supervised baseline", supervised),
    "P7": ("several criteria show it (at least 3 of VICReg, Barlow Twins, SimCLR, BYOL)", several),
    "P8": ("a larger invariance coefficient lowers the score at little cost (VICReg)", invariance),
    "P9": ("the temperature matters (SimCLR)", temperature),
    "P10a": (
        "the score hardly depends on the size of the training set, at fixed epochs (VICReg)",
        size,
    ),
    "P10b": (
        "the same at fixed steps, so that each image is seen less often",
        functools.partial(size, knob="trained_steps", fixed="steps"),
    ),
    "P11": ("corner crops show it too (VICReg)", corner),
    "P12": ("larger models score higher (VICReg)", width),
    "P13": ("the sign does not depend on k (VICReg)", neighbours),
    "P14": ("a one-model test agrees with the two-model test (VICReg)", one_model),
    "P15": ("an image memorized under one seed is memorized under another (VICReg)", again),
    "P16": ("atypical images are memorized more (VICReg)", outliers),
    "P17": ("the confidence gap tells members from others (VICReg)", members),
    "P18": ("at ρ = 0 the target exceeds the known Bayes accuracy (VICReg)", truth),
    "P19": (
        "reconstructions share more than the class: the second attribute (VICReg)",
        reconstructed,
    ),
}


def table(name: str) -> pd.DataFrame:
    """Return a row per claim: id, claim, value, n, seeds, verdict."""
    tables = _read(name)
    seeds = int(tables["scores"]["seeds"].iloc[0])
    rows = []
    for key, (claim, judge) in CLAIMS.items():
        value, verdict, n, *own = judge(tables)
        rows.append(
            {
                "id": key,
                "claim": claim,
                "value": value,
                "n": n,
                "seeds": (own or [seeds])[0] if n else 0,
                "verdict": verdict,
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    table(sys.argv[1]).to_csv(HERE / sys.argv[1] / "claims.csv", index=False)
    print(table(sys.argv[1])[["id", "verdict", "value"]].to_string(index=False))
