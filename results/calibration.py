"""How often the audit is wrong, and what it finds, by the number of pictures.

    .venv/bin/python results/calibration.py guesses   # audits the encoders of a plan: minutes
    .venv/bin/python results/calibration.py           # the table, from what the first command left

Encoder A of every piece of results/plan_scenes.md is audited twice: set A passed as its members,
which it was trained on, and set B, which it never saw. Both audits are then cut into audits of n
members and n held-out images that share no image, and each is judged as `make audit` judges.
"guesses" needs the encoders (runs/evidence-scenes, in the clone that trained them) and writes
scenes/calibration.parquet; the table is scenes/calibration.csv.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dejavu_utils import store  # noqa: E402  the path comes first
from dejavu_utils.audit import audit, estimate  # noqa: E402
from dejavu_utils.audit.settings import Settings  # noqa: E402
from results import evidence  # noqa: E402

SIZES = (50, 100, 150, 300)  # members of an audit, and held-out images
MARGIN = Settings().margin  # below which memory is called excluded
PIECE = ["seed", "criterion", "rho", "change"]


def guesses(name: str, folder: Path) -> pd.DataFrame:
    """Return what encoder A and the reference say of each image: a row per piece, members ("a",
    "b"), set and image, with `correct` of the target and the reference's `probability`.
    """
    planned = evidence.plan(name)
    found = []
    for piece in evidence.pieces(planned):
        if not (HERE / name / f"{piece.name}.zip").exists():
            continue
        pair = evidence.pair_of(planned, piece, folder)
        encoder = pair.jobs["A"].checkpoint(planned["epochs"][-1])
        if not store.intact(encoder):
            sys.exit(f"{encoder} is not there: run this in the clone that trained {piece.name}")

        for members in ("a", "b"):
            sets = [pair.parts[part] for part in (members, "public", "control")]
            found.append(of_audit(str(encoder), sets, planned, piece.seed))
            found[-1] = found[-1].assign(members=members, **piece._asdict())
        print(piece.name, flush=True)
    return pd.concat(found, ignore_index=True)


def of_audit(encoder: str, sets: list, planned: dict, seed: int) -> pd.DataFrame:
    """Return set, id, `correct` and `probability` of the images of one audit."""
    settings = Settings(k=planned["k"], limit=0, crop=planned["crop"], seed=seed)
    report = audit.examine(audit.load(encoder, *sets, settings=settings), settings)
    rows = report.guesses
    rows = rows[(rows["layer"] == report.case.layers[0]) & (rows["model"] == "target")]
    target = rows.loc[rows["role"] == "target", ["set", "id", "label", "correct"]]
    reference = rows.loc[rows["role"] == "reference", ["set", "id", "probability"]]
    found = target.merge(reference, on=["set", "id"], validate="one_to_one")
    return found.assign(probability=found["probability"].astype("float32"))


def judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the verdicts of the audits that one piece's images are cut into: a row per members, n
    and part.
    """
    about = {name: rows[name].iloc[0] for name in PIECE}
    found = []
    for members, of_encoder in rows.groupby("members"):
        sets = {name: shuffled(part, about["seed"]) for name, part in of_encoder.groupby("set")}
        for n in SIZES:
            for part in range(len(sets["members"]) // n):
                few = slice(part * n, (part + 1) * n)
                own, other = (tidy(sets[name][few]) for name in ("members", "held-out"))
                score = estimate.members_minus_held_out(own, other)
                found.append({"members": members, "images": n, "part": part} | score)
    return pd.DataFrame(found).assign(**about)


def shuffled(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return the rows of a set in a random order that the seed alone decides: every encoder of a
    seed is judged on the same parts.
    """
    order = np.random.default_rng([seed, 21]).permutation(len(rows))
    return rows.sort_values("id").iloc[order]


def tidy(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows as `estimate` takes them: one of the target and one of the reference for each
    image.
    """
    target = rows.assign(role="target", probability=np.nan)
    reference = rows.assign(role="reference", correct=False)
    return pd.concat([target, reference])


def table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return how often audits of n images say what: a row per members, criterion ("all" for all)
    and n, with the 95 % Clopper-Pearson interval of "memorizes".
    """
    encoder = verdicts[PIECE].astype(str).agg(" ".join, axis=1)
    verdicts = verdicts.assign(encoder=encoder)
    alike = verdicts.assign(criterion="all")
    rows = []
    for (members, n, criterion), part in pd.concat([alike, verdicts]).groupby(
        ["members", "images", "criterion"]
    ):
        alarms = part["low"] > 0
        low, high = binomtest(int(alarms.sum()), len(part)).proportion_ci(method="exact")
        rows.append(
            {
                "members": members,
                "criterion": criterion,
                "images": n,
                "audits": len(part),
                "encoders": part["encoder"].nunique(),
                "seeds": part["seed"].nunique(),
                "memorizes": int(alarms.sum()),
                "low": low,
                "high": high,
                "no_evidence": int((~alarms & (part["high"] < MARGIN)).sum()),
                "mean_score": part["score"].mean(),
            }
        )
    return pd.DataFrame(rows)


def main(name: str = "scenes") -> None:
    """Make the guesses, or the table from them."""
    path = HERE / name / "calibration.parquet"
    if sys.argv[1:] == ["guesses"]:
        rows = guesses(name, HERE.parent / "runs" / f"evidence-{name}")
        rows.to_parquet(path, index=False, compression="zstd")
        return
    if sys.argv[1:]:
        sys.exit(__doc__)

    rows = pd.read_parquet(path)
    verdicts = pd.concat([judged(part) for _, part in rows.groupby(PIECE)], ignore_index=True)
    found = table(verdicts)
    found.round(4).to_csv(HERE / name / "calibration.csv", index=False)
    print(found[found["criterion"] == "all"].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
