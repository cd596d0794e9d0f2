"""What settings change: measurements equal attack and probe done alone, changes are matched by
seed and have the right interval.
"""

import numpy as np
import pandas as pd
import pytest

from dejavu_utils import mitigation, plots
from dejavu_utils.attack import references, scoring
from dejavu_utils.models import launch
from dejavu_utils.models import pairs as build

PARAMS = {
    "seeds": [0],
    "dataset": "scenes",
    "rhos": [0.2, 0.0],
    "criteria": ["vicreg"],
    "epochs": [0, 2],
    "sizes": {"classes": 4, "attacked": 6, "shared": 0, "public": 10, "probe": 5, "control": 5},
    "recipe": {"encoder": "small4", "projector": "16-16-16", "batch": 12},
    "crop": {"kind": "periphery", "min_side": 8},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = build.make(PARAMS, tmp_path_factory.mktemp("runs"))[0]
    launch.fit_all(list(made.jobs.values()), workers=1)
    return made


def test_measure_is_the_attack_and_the_probe(pair):
    found = mitigation.measure(pair, 2, 5)
    alone = references.two_model(pair, 2, 5)
    for layer in ("projector", "backbone"):
        mine, other = (
            table[table["layer"] == layer].reset_index(drop=True) for table in (found, alone)
        )
        pd.testing.assert_frame_equal(mine[other.columns], other)
    judged = references.probes(pair, 2, augment=False).set_index("model")["held_out"]
    backbone = found[found["layer"] == "backbone"]
    for side, model in (("a", "A"), ("b", "B")):
        assert set(backbone[backbone["direction"] == side]["held_out"]) == {judged[model]}
    assert set(found["n_held_out"]) == {4 * 10}


def test_each_release_is_applied_to_everything(pair):
    found = mitigation.measure(
        pair, 2, 5, ("projector",), [{}, {"noise": 0.0}, {"noise": 1e9}, {"bits": 16}]
    )
    by = {number: part.reset_index(drop=True) for number, part in found.groupby("release")}
    same = ["id", "role", "prediction", "confidence", "held_out"]
    pd.testing.assert_frame_equal(by[0][same], by[1][same])
    assert (by[3]["prediction"] == by[0]["prediction"]).mean() > 0.9
    drowned = by[2].drop_duplicates("direction")["held_out"].mean()
    assert (
        abs(drowned - 0.25) < 0.2 and abs(by[2]["correct"].mean() - 0.25) < 0.25
    )  # noise alone: chance


def _table(
    seeds=(0, 1, 2),
    setting="default",
    value="default",
    extra=0.0,
    held=0.7,
    n=200,
    layer="projector",
    noise=0,
):
    """Return a made-up table: the target is right on .3 + extra, the reference on .2 of the
    images.
    """
    rows = []
    for seed in seeds:
        rng = np.random.default_rng([seed, noise])
        for side in "ab":
            for role, share in (("target", 0.3 + extra), ("reference", 0.2)):
                rows.append(
                    pd.DataFrame(
                        {
                            "id": [f"{side}-{i}" for i in range(n)],
                            "label": np.arange(n) % 4,
                            "direction": side,
                            "role": role,
                            "prediction": 0,
                            "correct": rng.random(n) < share,
                            "confidence": rng.random(n),
                            "seed": seed,
                            "held_out": held + 0.01 * seed,
                        }
                    )
                )
    table = pd.concat(rows, ignore_index=True)
    return table.assign(
        criterion="vicreg", setting=setting, value=value, layer=layer, n_held_out=400
    )


def test_changes_are_matched_by_seed():
    base, lower = _table(), _table(setting="weight_decay", value="0.1", extra=-0.1, held=0.65)
    free = _table(setting="noise", value="1.0", extra=-0.1, held=0.7)
    rows = mitigation.changes(pd.concat([base, lower, free]), resamples=200).set_index("setting")
    assert rows.loc["weight_decay", "over"] == "seeds" and rows.loc["noise", "over"] == "images"
    steps = [
        scoring.score(lower[lower["seed"] == seed])["score"]
        - scoring.score(base[base["seed"] == seed])["score"]
        for seed in range(3)
    ]
    expected = scoring.over_seeds(steps)
    assert rows.loc["weight_decay", "score_change"] == pytest.approx(expected["mean"])
    assert rows.loc["weight_decay", "score_change_low"] == pytest.approx(expected["low"])
    assert rows.loc["noise", "score_change"] == pytest.approx(
        scoring.difference(free, base, resamples=0)["difference"]
    )
    assert rows.loc["weight_decay", "held_out_change"] == pytest.approx(-0.05)
    assert rows.loc["weight_decay", "held_out_change_high"] == pytest.approx(
        -0.05
    )  # the same in every seed
    assert (
        rows.loc["default", ["score_change", "score_change_low", "held_out_change"]].abs().max()
        < 1e-12
    )
    one = mitigation.changes(
        pd.concat([t[t["seed"] == 0] for t in (base, lower)]), resamples=200
    ).set_index("setting")
    assert (
        one.loc["weight_decay", "over"] == "images"
        and one.loc["weight_decay", "score_change_low"] < -0.05
    )


def test_layers_are_compared_with_the_released_one_and_sizes_with_the_smallest():
    base = pd.concat([_table(), _table(layer="backbone", extra=-0.05)])
    layer = _table(setting="layer", value="backbone", layer="backbone", extra=-0.05)
    sizes = [
        _table(setting="trained", value=v, extra=e, noise=1) for v, e in (("30", 0.0), ("120", 0.2))
    ]
    rows = mitigation.changes(pd.concat([base, layer, *sizes]), resamples=100).set_index(
        ["setting", "value", "layer"]
    )
    assert rows.loc[("layer", "backbone", "backbone"), "score_change"] < -0.02
    assert rows.loc[("trained", "30", "projector"), "score_change"] == 0
    assert rows.loc[("trained", "120", "projector"), "score_change"] > 0.1
    assert rows.loc[("default", "default", "backbone"), "score_change"] == 0


def test_a_setting_without_its_default_is_an_error():
    turned = _table(setting="weight_decay", value="0.1")
    with pytest.raises(
        ValueError, match="weight_decay of vicreg: there is no default at layer projector"
    ):
        mitigation.changes(pd.concat([turned, _table(layer="backbone")]), resamples=10)


def test_the_figure_shows_every_value():
    tables = [
        _table(setting=setting, value=str(i), extra=-0.05 * i)
        for setting in ("noise", "bits")
        for i in range(3)
    ]
    tables.insert(0, _table())
    rows = mitigation.changes(pd.concat(tables), resamples=20)
    figure = plots.settings(rows)
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["VICReg:\nnoise on the release", "VICReg:\nbits a number (0: all)"]
    drawn = {y for axis in figure.axes for line in axis.lines for y in line.get_ydata()}
    changed = rows[rows["setting"] != "default"]
    assert {*changed["score"], *changed["score_20"], *changed["held_out"]} <= drawn
