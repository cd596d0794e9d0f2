"""Writes a file per encoder that a profile has still to train:
runs/<profile>/keys/jobs/<encoder>.json.

`make figures EXECUTOR=slurm` calls it before Snakemake, which makes a cluster job of each; the
notebooks wait for them and find every encoder there. Data is read and split here, on the machine
that submits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import batch

from dejavu_utils import mitigation, store
from dejavu_utils.attack import many_model
from dejavu_utils.models import pairs
from dejavu_utils.parameters import declared


def jobs(profile: str, overrides: dict) -> dict[str, dict]:
    """Return {folder of the encoder: its job as plain values} of all notebooks, without those that
    are done.
    """
    folder, found = store.runs(profile), {}
    for stage, values in batch.given(profile, overrides).items():
        params = declared(stage) | values
        if not {"criteria", "recipe", "epochs"} <= params.keys():
            continue  # this notebook trains nothing
        made = pairs.make(params, folder, "auto")
        settings = params.get("trained", {})
        made += [pair for *_, pair in mitigation.trained(params, folder, settings, "auto")]
        others = [name for name in settings if name not in params["criteria"]]
        if others:  # each setting needs its criterion's default
            defaults = params | {"criteria": others, "rhos": params["rhos"][:1]}
            made += pairs.make(defaults, folder, "auto")
        made += _more(made, params)
        found |= {job.folder: job for job in pairs.jobs(made) if not job.done()}
    return {path: dataclasses.asdict(job) for path, job in found.items()}


def _more(made: list, params: dict) -> list:
    """Return the further pairs that 07_other_measures asks for (`more`): other starts, random
    halves.
    """
    more = params.get("more", {"starts": 1, "many": 0})
    first = [
        pair
        for pair in made
        if pair.setting["criterion"] == params["criteria"][0]
        and pair.setting["rho"] not in params["rhos"][1:]
    ][: len(params["seeds"])]
    again = [many_model.again(pair, start) for start in range(1, more["starts"]) for pair in first]
    return again + (many_model.halves(first[0], more["many"]) if more["many"] else [])


def write(profile: str, overrides: dict) -> int:
    """Return how many encoders are to be trained, after writing their files; files of others are
    removed.
    """
    where, todo = store.runs(profile) / "keys" / "jobs", jobs(profile, overrides)
    names = {f"{Path(path).name}.json": [job] for path, job in todo.items()}
    for old in where.glob("*"):
        if old.name.removesuffix(".done") not in names:
            old.unlink()
    for name, content in names.items():
        with store.atomic(where / name) as temporary:
            temporary.write_text(json.dumps(content))
        (where / f"{name}.done").unlink(missing_ok=True)
    return len(names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="laptop")
    parser.add_argument("--set", default="", metavar="'NAME=VALUE …'")
    options = parser.parse_args()
    try:
        count = write(options.profile, batch.parse_overrides([], options.set))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{count} encoders to train, each a job of its own")
