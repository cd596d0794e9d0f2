"""Inside a notebook: `run = dv.start("02_attack", globals())` checks the parameters and says where
results go.
"""

import ast
import difflib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dejavu_utils import store

OPEN = {
    "constants",
    "trained",
}  # dicts whose names belong to somebody else (a criterion, `mitigation`), who checks them


class ParameterError(ValueError):
    """A parameter that the notebook does not declare, or a value of another type."""


def stages() -> list[str]:
    """Return the names of the notebooks, in order: notebooks/NN_name.ipynb."""
    return sorted(path.stem for path in (store.root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def cells(stage: str, tag: str | None = None) -> list[str]:
    """Return the sources of the cells of a notebook, or of those with a tag."""
    path = store.root() / "notebooks" / f"{stage}.ipynb"
    if not path.is_file():
        raise ParameterError(f"no notebook {path}; there are: {', '.join(stages())}.")
    found = json.loads(path.read_text())["cells"]
    wanted = [cell for cell in found if tag is None or tag in cell["metadata"].get("tags", [])]
    return ["".join(cell["source"]) for cell in wanted]


def literals(source: str) -> dict[str, Any] | None:
    """Return the names that `source` assigns if every statement is `name = literal`, else None."""
    try:
        statements = ast.parse(source).body
        pairs = [(getattr(s, "targets", None) or [s.target], s.value) for s in statements]
        plain = all(isinstance(s, (ast.Assign, ast.AnnAssign)) for s in statements)
        return {target.id: ast.literal_eval(value) for (target,), value in pairs} if plain else None
    except (SyntaxError, AttributeError, ValueError, TypeError):
        return None


def declared(stage: str) -> dict[str, Any]:
    """Return the parameters of a notebook and their defaults: the literals of its cell tagged
    `parameters`.
    """
    found = cells(stage, "parameters")
    values = literals(found[0]) if len(found) == 1 else None
    if values is None:
        raise ParameterError(
            f"{stage}: one cell tagged `parameters` with only `name = literal` lines is needed."
        )
    return values


def _fields(module: str, name: str) -> dict[str, Any]:
    """Return the fields of a dataclass of this package and their defaults, from its source: no
    import of torch.
    """
    tree = ast.parse((store.PACKAGE / f"{module}.py").read_text())
    body = next(
        node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name
    )
    values = {s.target.id: s.value for s in body if isinstance(s, ast.AnnAssign)}
    # what field(default_factory=lambda: {...}) makes
    made = {
        key: value.keywords[0].value.body
        for key, value in values.items()
        if isinstance(value, ast.Call)
    }
    return {key: ast.literal_eval(value) for key, value in (values | made).items()}


def _recipe() -> dict[str, Any]:
    """Return the fields of a recipe and their defaults, those of its views included.

    A criterion's name is a field too: it holds changes of the recipe for that criterion alone.
    """
    fields = _fields("models/recipe", "Recipe")
    fields |= {"views": _fields("models/views", "Views") | fields["views"]}
    source = (store.PACKAGE / "models/methods.py").read_text()
    criteria = re.findall(
        r'"(\w+)":', re.search(r"^METHODS = \{(.*?)\}", source, re.DOTALL | re.MULTILINE)[1]
    )
    return fields | {name: fields for name in criteria}


def _checked(label: str, value: Any, default: Any, fill: bool) -> Any:
    """Return `value` if it may replace `default`; with `fill`, dict keys that are missing are
    filled in from it.
    """
    if (
        default is None
        or type(value) is type(default)
        and not isinstance(value, (dict, list, tuple))
    ):
        return value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, dict) and isinstance(value, dict):
        if not default or re.split("[. ]", label)[-1] in OPEN:
            return value
        return (default if fill else {}) | merged(value, default, label + ".", fill)
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        return [
            _checked(f"{label}[{i}]", item, default[0], fill) if default else item
            for i, item in enumerate(value)
        ]
    pointed = (
        re.sub(r"^([+-]?\d+)(e[+-]?\d+)$", r"\1.0\2", value, flags=re.I)
        if isinstance(value, str)
        else value
    )
    hint = f" YAML reads {value} as text: write {pointed}." if pointed != value else ""
    raise ParameterError(
        f"{label} = {value!r} is {type(value).__name__}, expected {type(default).__name__} "
        f"such as {default!r}.{hint}"
    )


def merged(
    given: Mapping[str, Any], defaults: Mapping[str, Any], where: str = "", fill: bool = True
) -> dict[str, Any]:
    """Return `given` after checking names and types against `defaults`; ParameterError names the
    nearest parameter.

    An int may stand for a float; None only where the default is None. Dicts are filled in from the
    default, except `recipe`, which is checked against recipe.Recipe: Recipe itself fills in the
    rest.
    """
    checked = {}
    for name, value in given.items():
        if name not in defaults:
            near = difflib.get_close_matches(str(name), defaults, 1, 0.4)
            hint = (
                f"did you mean {where.split(': ')[-1]}{near[0]}?"
                if near
                else f"there are: {', '.join(defaults)}."
            )
            raise ParameterError(f"{where}{name} is not a parameter; {hint}")
        recipe = name == "recipe" and defaults[name] == {}
        default = _recipe() if recipe else defaults[name]
        checked[name] = _checked(f"{where}{name}", value, default, fill and not recipe)
    return checked


def _assigned(names: Mapping[str, Any], defaults: Mapping[str, Any]) -> set[str]:
    """Return the names that the parameters cell, and papermill's cell after it, have just assigned.

    With IPython they come from its history: the last cell of literals that sets most of the
    declared names, and the cells of literals right after it; so a typo that was corrected and
    scratch cells do not count. Without IPython (an exported script) they are all plain literals of
    the namespace.
    """
    if "get_ipython" not in names:
        plain = (bool, int, float, str, list, tuple, dict, type(None))
        return {
            name
            for name, value in names.items()
            if not name.startswith("_") and type(value) in plain
        }
    history = [literals(source) for source in names["In"]]
    most = [
        i
        for i, cell in enumerate(history)
        if cell and 2 * len(cell.keys() & defaults.keys()) >= len(defaults)
    ]
    assigned = set()
    for cell in history[most[-1] :] if most else []:
        if cell is None:
            break
        assigned |= cell.keys()
    return assigned


def parameters(stage: str, names: dict[str, Any]) -> dict[str, Any]:
    """Return the checked parameters of a running notebook, and write them back into `names`."""
    defaults = declared(stage)
    if missing := [name for name in defaults if name not in names]:
        raise ParameterError(
            f"{stage}: {missing[0]} is not set: run the cell tagged `parameters` first."
        )
    merged(
        dict.fromkeys(sorted(_assigned(names, defaults) - defaults.keys())), defaults, f"{stage}: "
    )
    values = merged({name: names[name] for name in defaults}, defaults, f"{stage}: ")
    names.update(values)
    return values


class Progress:
    """One line that is updated in place in a notebook (twice a second at most), or printed every 30
    s elsewhere.
    """

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label, self.began, self.shown, self.handle = (
            total,
            label,
            time.monotonic(),
            -1e9,
            None,
        )
        self.first = None  # what an earlier run had done already says nothing of the pace
        shell = sys.modules.get("IPython")  # a plain script runs without it
        self.live = shell is not None and hasattr(shell.get_ipython(), "kernel")

    def update(self, n: int, text: str = "") -> None:
        """Show that `n` of `total` are done, what is left at this pace, and `text`."""
        now = time.monotonic()
        if n < self.total and now - self.shown < (0.5 if self.live else 30):
            return
        self.shown, spent, self.first = (
            now,
            now - self.began,
            n if self.first is None else self.first,
        )
        left = spent * (self.total - n) / max(n - self.first, 1) / 60
        ending = (
            f"{spent:.0f} s"
            if n >= self.total
            else f"{left:.1f} min left"
            if n > self.first
            else ""
        )
        line = ", ".join(filter(None, [f"{self.label}: {n}/{self.total}", text, ending]))
        if status := os.environ.get("DEJAVU_PROGRESS"):  # the runner shows it in the terminal
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
            print(f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}")

    def figure(self, name: str, figure: Any, frame: Any) -> None:
        """Write figures/<name>.png, .pdf and .csv, the table behind it."""
        store.write_figure(self.folder / "figures" / name, figure, frame, self.meta)

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


def start(stage: str, names: dict[str, Any]) -> Run:
    """Return the `Run` of a notebook: parameters checked, generators seeded from (seed, stage),
    threads set.

    Call it as `start("02_attack", globals())` right after the parameters cell. Prints versions,
    device and settings.
    """
    params = parameters(stage, names)
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # before CUDA starts, for equal results on equal runs
    import random

    import numpy as np
    import torch

    torch.backends.cudnn.allow_tf32 = (
        False  # embeddings are promised in full precision; trainings choose their own
    )
    seed = int.from_bytes(
        hashlib.sha256(f"{_seed(params)}/{stage}".encode()).digest()[:4], "little"
    )
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  libraries that draw from the global generator
    torch.manual_seed(seed)
    recipe = _recipe() | params["recipe"] if "recipe" in params else {}
    if threads := params.get("threads") or recipe.get("threads"):
        torch.set_num_threads(threads)
    run = Run(
        stage,
        params.get("profile") or os.environ.get("DEJAVU_PROFILE", "laptop"),
        params,
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    where = (
        torch.cuda.get_device_name()
        if run.device == "cuda"
        else f"cpu, {torch.get_num_threads()} thread(s)"
    )
    print(
        f"{stage} · profile {run.profile} · seed {_seed(params)} · {where} · precision "
        f"{params.get('precision') or recipe.get('precision', 'fp32')}"
    )
    print(
        *(f"{name} {version} ·" for name, version in store.versions().items()),
        f"code {store.code_version()}",
    )
    return run
