"""How often the audit is wrong: the parts share no image, and planted truth is found."""

import numpy as np
import pandas as pd
import pytest

from dejavu_utils import store
from dejavu_utils.audit import estimate
from results import calibration


def guesses(memory, seed, controls=600):
    """Return what an encoder and the reference say of 300 images of each set, and of held-out ones;
    `memory` is how many more of set A the encoder names.
    """
    random = np.random.default_rng(seed)
    parts = []
    for members, more in (("a", memory), ("b", 0)):
        for name, n in (("members", 300), ("held-out", controls)):
            easy = random.uniform(0, 0.3, n)
            chance = easy + (more if name == "members" else 0)
            rows = {
                "set": name,
                "id": [f"{name} {members} {i:03d}" for i in range(n)],
                "label": np.arange(n) % 10,
                "correct": random.uniform(size=n) < chance,
                "probability": easy,
                "members": members,
            }
            parts.append(pd.DataFrame(rows))
    about = {"seed": seed, "criterion": "vicreg", "rho": 0.2, "change": ""}
    return pd.concat(parts, ignore_index=True).assign(**about)


@pytest.fixture(scope="module")
def verdicts():
    return pd.concat([calibration.judged(guesses(0.15, seed)) for seed in range(60)])


def test_false_alarms_are_few_and_memory_is_found(verdicts):
    table = calibration.table(verdicts).query("criterion == 'all'").set_index(["members", "images"])
    never = table.loc["b"]
    assert never.loc[50, "audits"] == 60 * 6 and never.loc[300, "audits"] == 60
    assert (never["encoders"] == 60).all() and (never["seeds"] == 60).all()
    assert never.loc[50, "low"] <= 0.025  # 2.5 % is what is promised; most audits are of this size
    assert (never["memorizes"] / never["audits"] < 0.08).all()
    own = table.loc["a", "memorizes"] / table.loc["a", "audits"]
    assert own.is_monotonic_increasing and own[300] > 0.9


def test_parts_of_one_size_share_no_image_and_all_of_them_are_one_audit():
    rows = guesses(0.1, 3, controls=300)
    whole = calibration.judged(rows).query("images == 300").set_index("members")
    members = rows.query("members == 'a' and set == 'members'")
    held_out = rows.query("members == 'a' and set == 'held-out'")
    expected = estimate.members_minus_held_out(
        calibration.tidy(members), calibration.tidy(held_out)
    )
    assert whole.loc["a", "score"] == pytest.approx(expected["score"])
    assert whole.loc["a", "low"] == pytest.approx(expected["low"], abs=0.01)

    order = calibration.shuffled(members, 3)
    parts = [set(order["id"][i * 50 : (i + 1) * 50]) for i in range(6)]
    assert len(set.union(*parts)) == 300
    assert parts[0] != set(members["id"][:50])


def test_documents_say_what_the_table_says():
    table = pd.read_csv(calibration.HERE / "scenes" / "calibration.csv")
    rows = table.query("members == 'b' and criterion == 'all'").set_index("images")
    few = rows.loc[50]
    share = few["memorizes"] / few["audits"]
    interval = f"[{100 * few['low']:.1f}, {100 * few['high']:.1f}]"

    readme = (store.root() / "README.md").read_text()
    assert f"{100 * share:.1f} % {interval} of {few['audits']} audits of 50 images" in readme
    assert f"by {few['encoders']} encoders" in readme

    of_audit = (store.root() / "dejavu_utils" / "audit" / "README.md").read_text()
    assert f"Measured on {few['encoders']} encoders" in of_audit
    assert f"of {few['audits']} audits of 50 members" in of_audit
    assert f'{few["memorizes"]} said "memorizes" ({100 * share:.1f} %, 95 % {interval}' in of_audit
