"""Inside a notebook: `run = dv.start("02_attack", globals())` checks the parameters and says where
results go.
"""

import hashlib
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dejavu_utils import store
from dejavu_utils.parameters import (
    ParameterError,
    cells,
    declared,
    literals,
    merged,
    of_profile,
    override,
    recipe_defaults,
    stages,
)

ROWS = 24  # of a table that a notebook shows
# In a notebook that runs as a plain script: the names of the parameters that it was given.
GIVEN = "__given__"


def _assigned(names: Mapping[str, Any], defaults: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """Return the names that the parameters cell has just assigned, and those that papermill's cell
    after it has.

    With IPython they are read from the cells that ran: the last one of literals that sets at least
    half of the declared names, and the cells of literals right after it. So neither a typo that was
    corrected nor a scratch cell counts. Without IPython (a plain script) they are all plain
    literals of the namespace, and those that GIVEN names.
    """
    if "get_ipython" not in names:
        plain = (bool, int, float, str, list, tuple, dict, type(None))
        public = {name: value for name, value in names.items() if not name.startswith("_")}
        assigned = {name for name, value in public.items() if type(value) in plain}
        return assigned, set(names.get(GIVEN, ()))

    assigned: set[str] = set()
    passed: set[str] = set()
    open_ended = False  # the last cell was the parameters cell, or one of literals after it
    for source in names["In"]:
        cell = literals(source) or {}
        declares = 2 * len(cell.keys() & defaults.keys()) >= len(defaults)

        if cell and open_ended and source.startswith("# Parameters"):  # papermill's
            passed |= cell.keys()
        elif cell and declares:
            assigned = set(cell)
            passed = set()
            open_ended = True
        elif cell and open_ended:
            assigned |= cell.keys()
        else:
            open_ended = False
    return assigned, passed


def _from_profile(
    stage: str, given: Mapping[str, Any], defaults: Mapping[str, Any], passed: set[str]
) -> dict[str, Any]:
    """Return the profile's values of those parameters that nobody has set: they stand at the
    notebook's own value, and were not passed.

    What was passed counts over the profile's value, of a dict key by key.
    The notebook's own values are those of its own profile.
    """
    profile = given.get("profile")
    if profile == defaults.get("profile") or not isinstance(profile, str):
        return {}

    values = of_profile(profile, stage)
    left = [name for name in values if name not in passed and given[name] == defaults[name]]
    both = passed & values.keys()
    over = override(values, {name: given[name] for name in both})
    return {name: over[name] for name in [*left, *both]}


def parameters(stage: str, names: dict[str, Any]) -> dict[str, Any]:
    """Return the checked parameters of a running notebook, and write them back into `names`.

    What the profile says counts where neither the cell nor papermill, or a script, says anything
    else.
    """
    defaults = declared(stage)
    given = {name: names[name] for name in defaults if name in names}
    assigned, passed = _assigned(names, defaults)
    unknown = dict.fromkeys(sorted((assigned | passed) - defaults.keys()))
    missing = [name for name in defaults if name not in given]
    if missing and not (given and unknown):  # a misspelt name leaves its parameter unset
        raise ParameterError(
            f"{stage}: {missing[0]} is not set: run the cell tagged `parameters` first."
        )

    values = merged(unknown | given, defaults, f"{stage}: ")
    values |= merged(_from_profile(stage, given, defaults, passed), defaults, f"{stage}: ")
    names.update(values)
    return values


class Progress:
    """One line that is updated in place in a notebook (twice a second at most), or printed every 30
    s elsewhere.
    """

    def __init__(self, total: int, label: str) -> None:
        self.total = total
        self.label = label
        self.began = time.monotonic()
        self.shown = -math.inf  # when the line was shown last
        self.first = None  # what an earlier run had done already says nothing of the pace
        self.handle = None
        shell = sys.modules.get("IPython")  # a plain script runs without it
        self.live = shell is not None and hasattr(shell.get_ipython(), "kernel")

    def update(self, n: int, text: str = "") -> None:
        """Show that `n` of `total` are done, what is left at this pace, and `text`."""
        now = time.monotonic()
        if n < self.total and now - self.shown < (0.5 if self.live else 30):
            return
        self.shown = now
        if self.first is None:
            self.first = n

        spent = now - self.began
        ending = ""
        if n >= self.total:
            ending = f"{spent:.0f} s"
        elif n > self.first:
            left = spent * (self.total - n) / (n - self.first) / 60
            ending = f"{left:.1f} min left"
        line = ", ".join(filter(None, [f"{self.label}: {n}/{self.total}", text, ending]))
        status = os.environ.get("DEJAVU_PROGRESS")
        if status:  # the runner shows it in the terminal
            Path(status).write_text(line)
        if not self.live:
            print(line, flush=True)
        elif self.handle is None:
            from IPython.display import display

            self.handle = display({"text/plain": line}, raw=True, display_id=True)
        else:
            self.handle.update({"text/plain": line}, raw=True)


@dataclass
class Run:
    """A running notebook: its checked parameters, its folder, and where its results go."""

    stage: str
    profile: str
    params: dict[str, Any]
    device: str
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Return the folder of this profile's results."""
        return store.runs(self.profile)

    @property
    def meta(self) -> dict[str, Any]:
        """Return what the sidecar of every result says about this notebook."""
        return {
            "stage": self.stage,
            "parameters": self.params,
            "seed": _seed(self.params),
            "device": self.device,
        }

    def progress(self, total: int, label: str) -> Progress:
        """Return a progress line for `total` steps."""
        return Progress(total, label)

    def record(self, **metrics: Any) -> None:
        """Print metrics and write all that this run recorded to metrics/<stage>.json."""
        self.metrics |= metrics
        store.write_json(self.folder / "metrics" / f"{self.stage}.json", self.metrics, self.meta)
        for name, value in metrics.items():
            if isinstance(value, dict):
                print(f"{name}:")
                for key, one in value.items():
                    print(f"  {key}: {one}")
            else:
                print(f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}")

    def figure(self, name: str, figure: Any, frame: Any) -> None:
        """Write figures/<name>.png, .pdf and .csv, the table behind it."""
        store.write_figure(self.folder / "figures" / name, figure, frame, self.meta)

    def film(self, name: str, content: bytes) -> None:
        """Write figures/<name>.png, an animated picture of `plots.film`."""
        with store.artifact(self.folder / "figures" / f"{name}.png", self.meta) as temporary:
            temporary.write_bytes(content)

    def table(self, name: str, frame: Any) -> None:
        """Write tables/<name>.csv for the notebooks that come after."""
        store.write_table(self.folder / "tables" / f"{name}.csv", frame, self.meta)

    def tables(self, name: str) -> Any:
        """Return a table that an earlier notebook of this profile wrote, as a DataFrame."""
        path = self.folder / "tables" / f"{name}.csv"
        if not path.is_file():
            makers = [
                s
                for s in stages()
                if re.search(rf"table\(\s*[\"']{re.escape(name)}[\"']", "\n".join(cells(s)))
            ]
            raise FileNotFoundError(
                f"{path} is not there: run {' or '.join(makers) or 'the notebook that writes it'} "
                f"first, or `make figures PROFILE={self.profile}`."
            )
        return store.read_table(path)


def _seed(params: Mapping[str, Any]) -> Any:
    """Return what a notebook declares as `seed` or `seeds`, else 0."""
    return params.get("seed", params.get("seeds", 0))


def _display_plainly() -> None:
    """Show texts without quotes, and tables without row numbers and at most 24 rows long."""
    module = sys.modules.get("IPython")  # a plain script runs without it
    shell = module and module.get_ipython()
    if not shell:
        return
    import pandas as pd

    def table(frame: pd.DataFrame) -> str:
        numbered = frame.index.name is None and pd.api.types.is_integer_dtype(frame.index)
        return frame.to_html(index=not numbered, border=0, na_rep="–", max_rows=ROWS)

    formatters = shell.display_formatter.formatters
    formatters["text/html"].for_type(pd.DataFrame, table)
    formatters["text/plain"].for_type(str, lambda text, printer, cycle: printer.text(text))


def start(stage: str, names: dict[str, Any]) -> Run:
    """Return the `Run` of a notebook: parameters checked, generators seeded from (seed, stage),
    threads set.

    Call it as `start("02_attack", globals())` right after the parameters cell. Prints versions,
    device and settings.
    """
    params = parameters(stage, names)
    # Before CUDA starts, for equal results on equal runs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    # Embeddings are promised in full precision; trainings choose their own.
    torch.backends.cudnn.allow_tf32 = False
    _seed_generators(f"{_seed(params)}/{stage}")

    recipe = recipe_defaults() | params["recipe"] if "recipe" in params else {}
    threads = params.get("threads") or recipe.get("threads")
    if threads:
        torch.set_num_threads(threads)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    profile = params.get("profile") or os.environ.get("DEJAVU_PROFILE", "laptop")
    run = Run(stage, profile, params, device)
    if "IPython" in sys.modules:
        _display_plainly()

    where = f"cpu, {torch.get_num_threads()} thread(s)"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    precision = params.get("precision") or recipe.get("precision", "fp32")
    settings = [stage, f"profile {profile}", f"seed {_seed(params)}", where]
    print(" · ".join([*settings, f"precision {precision}"]))
    versions = [f"{name} {version}" for name, version in store.versions().items()]
    print(" · ".join([*versions, f"code {store.code_version()}"]))
    return run


def _seed_generators(name: str) -> None:
    """Seed the global generators of Python, numpy and torch from a name."""
    import random

    import numpy as np
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries that draw from the global generator
    torch.manual_seed(seed)
