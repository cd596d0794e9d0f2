"""Privacy against utility (the paper's §6): what each setting of each knob costs and saves, and
advice in words.
"""

import functools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from dejavu_utils.attack import inference, probe, references, scoring, summaries
from dejavu_utils.mitigation import knobs
from dejavu_utils.models.pairs import Pair

SETTING = ["criterion", "knob", "value", "layer"]
RELEASED = ("layer", "epoch", "noise", "bits")  # knobs that leave the encoders as they are


@references.cached("tradeoff")
def measure(
    pair: Pair,
    epoch: int,
    k: int,
    layers: tuple[str, ...] = ("projector", "backbone"),
    releases: Sequence[dict] = ({},),
    device: str = "cpu",
) -> pd.DataFrame:
    """Return the label-inference table of a pair for every layer and release, with its usefulness
    beside it.

    `releases` are arguments of `knobs.release`, applied to all that leaves the encoder. Columns:
    those of `references.two_model`, `release` (its number), `held_out`: accuracy on `n_held_out`
    images that no encoder saw (probe and control set) of a linear probe trained on the target's own
    images, at that layer and release.
    """
    seen, public, at, targets = (
        {side: pair.parts[side] for side in ("a", "b")},
        pair.parts["public"],
        {},
        {},
    )
    encoders = {model: pair.encoder(model, epoch) for model in ("A", "B")}
    rules = inference.Rules(**pair.rules)
    embed = functools.partial(
        references.embed_images, size=pair.size(), layers=layers, device=device, keep=rules.keep
    )
    for side, images in seen.items():
        targets[side], rects = references.cropped(images, pair.crop)
        at[side] = embed(encoders, targets[side], rects=rects)
        at["own " + side] = embed(
            {inference.TARGETS[side]: encoders[inference.TARGETS[side]]}, images
        )
    at["public"] = embed(encoders, public)
    at["held"], truth = references.held_out(pair, encoders, layers, device)
    ids, labels = (
        {side: getattr(images, of) for side, images in targets.items()} for of in ("ids", "labels")
    )
    tables = []
    for layer in layers:
        for number, how in enumerate(releases):
            out = {
                name: {
                    model: knobs.release(
                        values, at["public"][layer][model], **how, seed=f"{name}/{model}"
                    )
                    for model, values in found[layer].items()
                }
                for name, found in at.items()
            }
            out |= {
                side: {model: values.to(device) for model, values in out[side].items()}
                for side in targets
            }
            table = inference.label_inference(
                out, out["public"], public.labels, ids, labels, k, len(public.classes), rules
            )
            useful = {
                side: probe.linear_probe(
                    out["own " + side][model],
                    seen[side].labels,
                    out["held"][model],
                    truth,
                    len(public.classes),
                )["test"]
                for side, model in inference.TARGETS.items()
            }
            tables.append(
                table.assign(layer=layer, release=number, held_out=table["direction"].map(useful))
            )
    return pd.concat(tables, ignore_index=True).assign(
        **pair.setting, epoch=epoch, k=k, attacked="attacked", n_held_out=len(truth)
    )


def rows(table: pd.DataFrame, released: str = "projector", resamples: int = 1000) -> pd.DataFrame:
    """Return a row per setting: déjà vu score at p = 100 and 20 %, held-out accuracy, and both
    against the default.

    `table` is of `measure`, with columns `knob` and `value` (text). A value is compared with the
    knob "default" at its own layer, a layer with the default at `released`, a training-set size
    with its knob's first value. Columns: `score`, `score_20`, `held_out`, `score_change` and
    `held_out_change`, each with _low and _high, n, n_held_out. Changes are seed-matched: a
    t-interval over seeds, or of a knob that leaves the encoders alone, or with one seed, the
    bootstrap's over images (binomial for the probe), named in `over`. Needs one rho, and one epoch
    a value.
    """
    found = []
    for (criterion, knob, value, layer), part in table.groupby(SETTING, sort=False):
        base = _base(table, criterion, knob, released if knob == "layer" else layer)
        row = {
            "criterion": criterion,
            "knob": knob,
            "value": value,
            "layer": layer,
            "seeds": part["seed"].nunique(),
        }
        for score in scoring.curve(part, (100, 20), resamples=resamples):
            suffix = "" if score["p"] == 100 else "_20"
            row |= {
                f"score{suffix}{end}": score[end[1:] or "score"] for end in ("", "_low", "_high")
            }
            row["n"] = score["n"]
        found.append(row | _change(part, base, knob, resamples))
    return pd.DataFrame(found)


def by_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per setting and seed: score over all images and held-out accuracy, for tests
    that permute seeds.
    """
    return pd.DataFrame(
        [
            dict(zip([*SETTING, "seed"], setting, strict=True))
            | {
                "score": scoring.score(part, resamples=0)["score"],
                "held_out": _held_out(part).iloc[0],
            }
            for setting, part in table.groupby([*SETTING, "seed"], sort=False)
        ]
    )


def _base(table: pd.DataFrame, criterion: str, knob: str, layer: str) -> pd.DataFrame:
    """Return the part of the table that a setting is compared with."""
    mine = table[table["criterion"] == criterion]
    if knob.startswith("trained"):
        mine = mine[(mine["knob"] == knob) & (mine["layer"] == layer)]
        return mine[mine["value"] == mine["value"].iloc[0]]
    mine = mine[(mine["knob"] == "default") & (mine["layer"] == layer)]
    if not len(mine):
        raise ValueError(
            f"tradeoff.rows: {knob} of {criterion}: there is no default at layer {layer} to "
            "compare with. "
            "Measure the default pair of every criterion whose knobs are turned."
        )
    return mine


def _held_out(part: pd.DataFrame) -> pd.Series:
    """Return the held-out accuracy of every seed, the mean over A and B."""
    return part.drop_duplicates(["seed", "direction"]).groupby("seed")["held_out"].mean()


def _change(part: pd.DataFrame, base: pd.DataFrame, knob: str, resamples: int) -> dict:
    """Return held_out, score_change and held_out_change, each with its interval, and what that of
    changes is over.
    """
    useful, before = _held_out(part), _held_out(base)
    n, steps = int(part.groupby("seed")["n_held_out"].first().sum()), (useful - before).to_numpy()
    one, other = (values.mean() * (1 - values.mean()) / n for values in (useful, before))
    row = summaries.interval(useful.to_numpy(), one, "held_out") | {"n_held_out": n}
    if knob in RELEASED or len(steps) == 1:
        found, over = scoring.difference(part, base, resamples=resamples), "images"
        row |= {
            f"score_change{end}": found[end[1:] or "difference"] for end in ("", "_low", "_high")
        }
    else:
        scores = [
            table.groupby("seed").apply(lambda one: scoring.score(one, resamples=0)["score"])
            for table in (part, base)
        ]
        row, over = (
            row | summaries.interval((scores[0] - scores[1]).to_numpy(), 0.0, "score_change"),
            "seeds",
        )
    return row | summaries.interval(steps, one + other, "held_out_change") | {"over": over}


def front(table: pd.DataFrame) -> np.ndarray:
    """Return which rows are on the Pareto front, bool: nothing else has a lower score and is as
    useful, or better.
    """
    score, useful = table["score"].to_numpy(), table["held_out"].to_numpy()
    beaten = [
        (((score < s) & (useful >= u)) | ((score <= s) & (useful > u))).any()
        for s, u in zip(score, useful, strict=True)
    ]
    return ~np.array(beaten, bool)


def verdict(low: float, high: float, down: str, up: str) -> str:
    """Return `down` or `up` where an interval excludes 0, else "undecided"."""
    return down if high < 0 else up if low > 0 else "undecided"


def directions(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per knob: what its farthest value from the default does to the score and to
    usefulness, two-sided.

    The farthest value is the last one listed, or the first where the last is the default (early
    stopping). `score` says lower, higher or undecided, `useful` less, more or undecided.
    """
    found = []
    for (criterion, knob), part in table[table["knob"] != "default"].groupby(
        ["criterion", "knob"], sort=False
    ):
        last = part.iloc[
            -1 if part["score_change"].iloc[-1] or part["held_out_change"].iloc[-1] else 0
        ]
        found.append(
            {
                "criterion": criterion,
                "knob": knobs.NAMES.get(knob, knob),
                "value": last["value"],
                "score": verdict(
                    last["score_change_low"], last["score_change_high"], "lower", "higher"
                ),
                "useful": verdict(
                    last["held_out_change_low"], last["held_out_change_high"], "less", "more"
                ),
            }
            | {name: last[name] for name in last.index if "change" in name}
            | {name: last[name] for name in ("over", "n", "seeds")}
        )
    return pd.DataFrame(found)


def advice(table: pd.DataFrame, most: float = 0.02) -> str:
    """Return advice in words: the setting that lowers the score most among those that cost at most
    `most` accuracy.

    Settings whose interval excludes 0 come first; if there is none, the advice is called undecided.
    Choosing the best of many flatters it: the sentence says among how many it was chosen, and its
    interval is not corrected for that.
    """
    tried = table[table["knob"] != "default"]
    cheap = tried[(tried["held_out_change"] >= -most) & (tried["score_change"] < 0)]
    if not len(cheap):
        return (
            f"None of {len(tried)} settings lowers the score and costs at most {most:.2f} of "
            "held-out accuracy: "
            "keep the default, and do not release it where its score matters."
        )
    decided = cheap[cheap["score_change_high"] < 0]
    best = (decided if len(decided) else cheap).sort_values("score_change", kind="stable").iloc[0]
    sure = (
        "its interval excludes 0"
        if best["score_change_high"] < 0
        else "undecided: its interval holds 0"
    )
    useful = verdict(best["held_out_change_low"], best["held_out_change_high"], "a cost", "a gain")
    name = knobs.NAMES.get(best["knob"], best["knob"])
    return (
        f"{name}: {best['value']} ({best['criterion']}). Of {len(tried)} settings, {len(cheap)} "
        "lower the déjà vu "
        f"score at a cost of at most {most:.2f} of held-out accuracy, {len(decided)} of them "
        "beyond doubt of their "
        f"intervals; of these it lowers the score most, by "
        f"{_text(best, 'score_change')} to {best['score']:+.3f} ({sure}). Held-out accuracy "
        "changes by "
        f"{_text(best, 'held_out_change')} ({useful}). The best of many is flattered by the "
        "choice, and its "
        f"interval is not corrected for that. {best['seeds']} seed(s), n = {best['n']}."
    )


def _text(row: pd.Series, name: str) -> str:
    return f"{row[name]:+.3f} [{row[name + '_low']:+.3f}, {row[name + '_high']:+.3f}]"
