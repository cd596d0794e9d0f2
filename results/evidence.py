"""Run a plan's trainings, one seed and criterion at a time, and judge its claims from what they
left.

    .venv/bin/python results/evidence.py run scenes --minutes 60
    .venv/bin/python results/evidence.py claims scenes

The first runs the next pieces of results/plan_scenes.md, whose yaml block is the plan, committed
before any of its seeds is run. A piece is one pair of encoders (seed, criterion, rho). It leaves
results/<name>/<piece>.zip: every guess of the attack, both probes, measures without labels, and
what the audit says of encoder A, about images that it was trained on and images that it never saw;
no weight and no picture. A piece whose file is there is done. The second writes values.csv and
claims.csv.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from scipy import stats

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from dejavu_utils import store  # noqa: E402  the path comes first

LAYERS = ("projector", "backbone")


class Piece(NamedTuple):
    """One pair of encoders of a plan; `change` names one of the plan's changes of the recipe."""

    seed: int
    criterion: str
    rho: float
    change: str = ""

    @property
    def name(self) -> str:
        name = f"{self.seed}-{self.criterion}-{self.rho:g}"
        return f"{name}-{self.change}" if self.change else name


def plan(name: str, folder: Path = HERE) -> dict[str, Any]:
    """Return the machine-readable part of results/plan_<name>.md."""
    text = (folder / f"plan_{name}.md").read_text(encoding="utf-8")
    return yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])


def pieces(planned: dict[str, Any]) -> list[Piece]:
    """Return all pieces, in the plan's order: block by block, in a block seed by seed."""
    found = []
    for block in planned["order"]:
        for seed in planned["seeds"]:
            for criterion in block["criteria"]:
                for rho in block["rhos"]:
                    found += [
                        Piece(seed, criterion, rho, change) for change in block.get("changes", [""])
                    ]
    return found


def recipe(planned: dict[str, Any], change: str) -> dict[str, Any]:
    """Return the plan's recipe with one of its changes: dictionaries in it are merged."""
    found = dict(planned["recipe"])
    if change:
        for name, value in planned["changes"][change].items():
            found[name] = found.get(name, {}) | value if isinstance(value, dict) else value
    return found


def parameters(planned: dict[str, Any], piece: Piece) -> dict[str, Any]:
    """Return the parameters of a piece's encoders."""
    params = {key: planned[key] for key in ("dataset", "sizes", "epochs", "crop")}
    return params | {"recipe": recipe(planned, piece.change)}


def unchanged(planned: dict[str, Any], out: Path) -> list[Piece]:
    """Return the pieces that were run of the plan's recipe as it is, at its first rho."""
    first = planned["order"][0]["rhos"][0]
    alike = [piece for piece in pieces(planned) if piece.rho == first and not piece.change]
    return [piece for piece in alike if (out / f"{piece.name}.zip").exists()]


def pair_of(planned: dict[str, Any], piece: Piece, folder: Path) -> Any:
    """Return the pair of a piece's encoders, which are in `folder` if they were trained."""
    from dejavu_utils.models import pairs

    params = parameters(planned, piece)
    return pairs.one(params, folder, piece.criterion, piece.rho, piece.seed)


# -- a piece ----------------------------------------------------------------------------------


def measure(planned: dict[str, Any], piece: Piece, folder: Path) -> dict[str, pd.DataFrame]:
    """Return the tables of a piece, after training its encoders in `folder` if they are not there:
    guesses, probes, statistics, audit, audit_images, losses.
    """
    from dejavu_utils.attack import measures, references
    from dejavu_utils.models import launch, pairs

    params = parameters(planned, piece)
    pair = pair_of(planned, piece, folder)
    launch.fit_all(pairs.jobs([pair]))

    k = planned["k"]
    last = planned["epochs"][-1]
    guesses = [references.two_model(pair, epoch, k) for epoch in planned["epochs"]]
    guesses.append(references.two_model(pair, last, k, attacked="control"))
    probes = [
        references.probes(pair, epoch, layer) for epoch in planned["epochs"] for layer in LAYERS
    ]
    audits, images = audited(params | {"k": k, "seeds": [piece.seed]}, pair)
    return {
        "guesses": pd.concat(guesses, ignore_index=True),
        "probes": pd.concat(probes, ignore_index=True),
        "statistics": measures.statistics(pair, last, k),
        "audit": audits,
        "audit_images": images,
        "losses": pairs.losses([pair]),
    }


def audited(params: dict[str, Any], pair: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what the audit of encoder A says where set A is passed as its members, and where set B
    is, which it never saw: a row each; and the statistics of single images.
    """
    from dejavu_utils.audit import audit
    from dejavu_utils.audit.settings import Settings

    settings = Settings(k=params["k"], limit=0, crop=params["crop"], seed=params["seeds"][0])
    encoder = str(pair.jobs["A"].checkpoint(params["epochs"][-1]))
    rows, images = [], []
    for members in ("a", "b"):
        sets = [pair.parts[name] for name in (members, "public", "control")]
        found = audit.examine(audit.load(encoder, *sets, settings=settings), settings)
        verdict = found.verdict
        row = {"members": members, "word": verdict.word, "why": verdict.why, "n": verdict.n}
        row |= {"score": verdict.score, "low": verdict.low, "high": verdict.high}
        failed = found.controls.loc[~found.controls["passed"], "control"]
        rows.append(row | {"failed": ", ".join(failed)})
        images.append(found.statistics.assign(members=members))
    about = dict(pair.setting)
    return pd.DataFrame(rows).assign(**about), pd.concat(images, ignore_index=True).assign(**about)


def pack(path: Path, tables: dict[str, pd.DataFrame], made: dict[str, Any]) -> None:
    """Write the tables of a piece and how they were made, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    with (
        store.atomic(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, table in tables.items():
            buffer = io.BytesIO()
            table.to_parquet(buffer, index=False, compression="zstd")
            archive.writestr(f"{name}.parquet", buffer.getvalue())
        archive.writestr("made.json", json.dumps(made, indent=1, default=str))


def unpack(path: Path, name: str) -> pd.DataFrame:
    """Return one table of a piece."""
    with zipfile.ZipFile(path) as archive:
        return pd.read_parquet(io.BytesIO(archive.read(f"{name}.parquet")))


def run(name: str, minutes: float, folder: Path, out: Path, seeds: list[int]) -> None:
    """Run the pieces that are missing of these seeds, in order; none is begun that would not end in
    time, if it takes as long as the last one.
    """
    planned = plan(name)
    end = time.monotonic() + 60 * minutes
    took = 0.0
    for piece in pieces(planned):
        path = out / f"{piece.name}.zip"
        if path.exists() or piece.seed not in seeds:
            continue
        if time.monotonic() + took > end:
            return
        began = time.monotonic()
        made = {"plan": planned, "piece": piece._asdict(), "commit": _commit()}
        tables = measure(planned, piece, folder)
        took = time.monotonic() - began
        made |= {"seconds": took, "cores": store.cores(), **store.versions()}
        pack(path, tables, made)
        print(f"{piece.name}: {took:.0f} s", flush=True)


def _commit() -> str:
    git = ["git", "rev-parse", "HEAD"]
    return subprocess.run(git, cwd=HERE, capture_output=True, text=True).stdout.strip()


# -- claims -----------------------------------------------------------------------------------


def value(out: Path, piece: Piece, what: dict[str, Any], planned: dict[str, Any]) -> float:
    """Return one statistic of one piece; NaN if the piece was not run.

    `what`: `of` score (accuracy of the target minus the reference's), target (its accuracy),
    alignment or similarity (of training images, target minus reference), gap, fresh_gap or held_out
    (of the linear probe); at `layer`, `epoch`, `p`, which are the projector (probes: the backbone),
    the last one and 100 % if not given.
    """
    from dejavu_utils.attack import scoring

    path = out / f"{piece.name}.zip"
    if not path.exists():
        return float("nan")
    of = what["of"]
    epoch = what.get("epoch", planned["epochs"][-1])
    if of in ("score", "target"):
        rows = unpack(path, "guesses").query("attacked == 'attacked'")
        rows = rows[(rows["epoch"] == epoch) & (rows["layer"] == what.get("layer", "projector"))]
        return float(scoring.score(rows, what.get("p", 100), resamples=0)[of])
    if of in ("alignment", "similarity"):
        rows = unpack(path, "statistics")
        return float(rows.loc[rows["member"], f"{of}_gap"].mean())
    rows = unpack(path, "probes")
    rows = rows[(rows["epoch"] == epoch) & (rows["layer"] == what.get("layer", "backbone"))]
    return float(rows[of].mean())


def values(name: str, out: Path, planned: dict[str, Any]) -> pd.DataFrame:
    """Return a row per claim and seed: claim, seed, value (NaN: not run)."""
    rows = []
    for claim in planned["claims"]:
        for seed in planned["seeds"]:
            found = _claimed(out, seed, claim, planned)
            rows.append({"claim": claim["id"], "seed": seed, "value": found})
    return pd.DataFrame(rows)


def _claimed(out: Path, seed: int, claim: dict[str, Any], planned: dict[str, Any]) -> float:
    total = 0.0
    for sign, key in ((1, "value"), (-1, "minus")):
        what = claim.get(key)
        if isinstance(what, dict):
            rho = what.get("rho", planned["order"][0]["rhos"][0])
            piece = Piece(seed, what["criterion"], rho, what.get("change", ""))
            total += sign * value(out, piece, what, planned)
        elif what is not None:
            total += sign * what
    return total


def judged(found: pd.DataFrame, planned: dict[str, Any]) -> pd.DataFrame:
    """Return a row per claim: n seeds, mean, t-interval, sd, p, Holm's p, verdict. Holm's is over
    the claims of a family: those that name none are the primary ones.

    "supported": Holm's p below the level and the mean beyond the margin on the claimed side;
    "contradicted": Holm's p below the level on the other side; else "undecided", with the effect
    that so many seeds show four times in five. Fewer than `fewest` seeds: "not run".
    """
    level = planned["level"]
    rows = []
    for claim in planned["claims"]:
        values = found.loc[found["claim"] == claim["id"], "value"].dropna().to_numpy()
        about = {"claim": claim["id"], "family": claim.get("family", "primary")}
        rows.append(about | {"says": claim["says"]} | over_seeds(values, level))
    table = pd.DataFrame(rows)
    ran = table["seeds"] >= planned["fewest"]
    table["p_holm"] = table[ran].groupby("family")["p"].transform(holm)
    sides = {claim["id"]: claim for claim in planned["claims"]}
    table["verdict"] = [
        _verdict(row, sides[row["claim"]], level) if ok else "not run"
        for row, ok in zip(table.to_dict("records"), ran, strict=True)
    ]
    return table


def over_seeds(values: np.ndarray, level: float) -> dict[str, float]:
    """Return seeds, mean, low, high (Student's t), sd, p (two-sided, of mean 0) and `smallest`, the
    effect that so many seeds show four times in five.
    """
    n = len(values)
    if n < 2:
        return dict.fromkeys(("mean", "low", "high", "sd", "p", "smallest"), np.nan) | {"seeds": n}
    mean, sd = values.mean(), values.std(ddof=1)
    error = sd / n**0.5
    quantile = stats.t.ppf(1 - level / 2, n - 1)
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return {
        "seeds": n,
        "mean": mean,
        "low": mean - quantile * error,
        "high": mean + quantile * error,
        "sd": sd,
        "p": p,
        "smallest": (quantile + stats.t.ppf(0.8, n - 1)) * error,
    }


def holm(values: pd.Series) -> np.ndarray:
    """Return Holm's adjusted p-values."""
    p = values.to_numpy()
    order = np.argsort(p)
    factors = len(p) - np.arange(len(p))
    adjusted = np.maximum.accumulate(p[order] * factors).clip(max=1)
    found = np.empty(len(p))
    found[order] = adjusted
    return found


def _verdict(row: dict[str, Any], claim: dict[str, Any], level: float) -> str:
    side = {"above": 1, "below": -1}[claim["side"]]
    if row["p_holm"] >= level:
        return "undecided"
    if side * row["mean"] < 0:
        return "contradicted"
    return "supported" if side * row["mean"] >= claim.get("margin", 0) else "undecided"


def grid(head: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def claims(name: str, out: Path) -> pd.DataFrame:
    """Write values.csv and claims.csv of a plan, and return the claims."""
    planned = plan(name)
    found = values(name, out, planned)
    table = judged(found, planned)
    found.to_csv(out / "values.csv", index=False)
    table.to_csv(out / "claims.csv", index=False)
    return table


def missing(name: str, out: Path) -> Iterator[Piece]:
    """Yield the pieces of a plan that were not run."""
    for piece in pieces(plan(name)):
        if not (out / f"{piece.name}.zip").exists():
            yield piece


def main() -> None:
    """Run pieces, or judge claims."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "claims"))
    parser.add_argument("plan", help="such as scenes, of results/plan_scenes.md")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--seeds", type=int, nargs="+", help="these alone: two may run at once")
    options = parser.parse_args()
    out = HERE / options.plan
    if options.command == "run":
        folder = store.runs(f"evidence-{options.plan}")
        seeds = options.seeds or plan(options.plan)["seeds"]
        run(options.plan, options.minutes, folder, out, seeds)
    else:
        print(claims(options.plan, out).to_string(index=False))
    left = len(list(missing(options.plan, out)))
    print(f"{left} pieces of the plan were not run")


if __name__ == "__main__":
    main()
