"""What a notebook declares as parameters, the check of names and types against it, and profiles."""

import ast
import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field, Strict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from dejavu_utils import store
from dejavu_utils.models import recipe

# Dicts whose names belong to somebody else (a criterion, `mitigation`), who checks them.
OPEN = {"constants", "trained"}
# Lists of which the first entry or the last has a meaning of its own; every other may be empty.
FILLED = {"seeds", "rhos", "criteria", "epochs", "top_p", "conditions", "channels", "blocks"}


class ParameterError(ValueError):
    """A parameter that the notebook does not declare, or a value of another type."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows: the message; where it was raised is of no use here."""
        return [f"ParameterError: {self}"]


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
    values = {}
    try:
        for statement in ast.parse(source).body:
            match statement:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    values[name] = ast.literal_eval(value)
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    values[name] = ast.literal_eval(value)
                case _:
                    return None
    except (SyntaxError, ValueError, TypeError):
        return None
    return values


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


def recipe_defaults() -> dict[str, Any]:
    """Return the fields of a recipe and their defaults, those of its views included.

    A criterion's name is a field too: it holds changes of the recipe for that criterion alone.
    """
    fields = dataclasses.asdict(recipe.Recipe())
    fields["views"] = dataclasses.asdict(recipe.Views()) | fields["views"]
    return fields | {criterion: fields for criterion in recipe.CRITERIA}


def _type(name: str, default: Any) -> Any:
    """Return the type that a value must have to stand for `default`, as pydantic reads types."""
    if default is None:
        return Any

    if isinstance(default, dict):
        is_open = not default or name in OPEN
        return dict[str, Any] if is_open else _types(default)

    if isinstance(default, (list, tuple)):
        element = _type(name, default[0]) if default else Any
        length = Field(min_length=int(name in FILLED))
        return Annotated[list[element], Strict(False), length]  # a tuple will do

    return type(default)


def _types(defaults: Mapping[str, Any]) -> Any:
    """Return a dict type with the names of `defaults`, any of which may be absent."""
    fields = {name: _type(name, default) for name, default in defaults.items()}
    kind = TypedDict("Parameters", fields, total=False)
    kind.__pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    return kind


def _message(error: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors in the words of this package."""
    *outer, name = error["loc"]
    value = error["input"]

    default: Any = defaults
    for part in outer:
        default = default[0 if isinstance(part, int) else part]

    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(name), default, 1, 0.4)
        full = ".".join([*outer, str(name)])
        hint = f"there are: {', '.join(default)}."
        if near:
            hint = f"did you mean {'.'.join([*outer, near[0]])}?"
        return f"{where}{full} is not a parameter; {hint}"

    default = default[0 if isinstance(name, int) else name]
    label = ""
    for part in error["loc"]:
        label += f"[{part}]" if isinstance(part, int) else f".{part}"
    found = f"{where}{label[1:]} = {value!r}"

    if error["type"] == "too_short":
        return f"{found} is empty, expected at least one entry, such as {default!r}."

    if error["type"] == "finite_number":
        return f"{found}, expected a finite number such as {default!r}."

    hint = ""
    if isinstance(value, str):
        # YAML takes 1e-6 for text and 1.0e-6 for a number.
        pointed = re.sub(r"^([+-]?\d+)(e[+-]?\d+)$", r"\1.0\2", value, flags=re.IGNORECASE)
        if pointed != value:
            hint = f" YAML reads {value} as text: write {pointed}."
        if isinstance(default, list | dict) and value.startswith(("[", "{")):
            hint = (
                f' papermill -p passes text: use -y "{name}: {value}", or'
                " .venv/bin/python notebooks/batch.py run."
            )

    expected = type(default).__name__
    return f"{found} is {type(value).__name__}, expected {expected} such as {default!r}.{hint}"


def _filled(value: Any, default: Any, name: str) -> Any:
    """Return `value`; the names that a dict lacks are taken from `default`."""
    if not isinstance(value, dict) or not default or name in OPEN:
        return value

    inner = {key: _filled(entry, default[key], key) for key, entry in value.items()}
    return default | inner


def merged(
    given: Mapping[str, Any], defaults: Mapping[str, Any], where: str = ""
) -> dict[str, Any]:
    """Return `given` after a check of names and types against `defaults`; ParameterError names the
    nearest parameter.

    An int may stand for a float; None only where the default is None. Dicts are filled in from the
    default, except `recipe`, which is checked against recipe.Recipe: Recipe itself fills in the
    rest.
    """
    known = dict(defaults)
    if known.get("recipe") == {}:
        known["recipe"] = recipe_defaults()

    try:
        checked = TypeAdapter(_types(known)).validate_python(dict(given))
    except ValidationError as error:
        raise ParameterError(_message(error.errors()[0], where, known)) from None

    epochs = checked.get("epochs")
    if isinstance(epochs, list) and max(epochs) < 1:
        raise ParameterError(
            f"{where}epochs = {epochs!r} trains nothing, expected one above 0, such as "
            f"{defaults['epochs']!r}."
        )

    return {name: _filled(value, defaults[name], name) for name, value in checked.items()}


def override(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters `base` with those of `given` over them.

    A key of a dict overrides that key alone, at any depth; a dict of OPEN is replaced as a whole.
    """
    values = dict(base)
    for name, value in given.items():
        below = values.get(name)
        if isinstance(value, dict) and isinstance(below, dict) and name not in OPEN:
            value = override(below, value)
        values[name] = value
    return values


def profiled(name: str) -> dict[str, dict]:
    """Return the sections of notebooks/profiles/<name>.yaml, each name checked to be declared where
    it is given.
    """
    folder = store.root() / "notebooks" / "profiles"
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        raise ParameterError(f"no profile {name!r}; there are: {', '.join(known)}.")

    path = folder / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ParameterError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict) or not all(
        isinstance(part, dict) for part in content.values()
    ):
        raise ParameterError(
            f"{path}: expected sections `all:` and notebook names, each with `name: value` lines."
        )
    merged(content, {"all": {}} | {stage: {} for stage in stages()}, f"{path.name}: ")
    return content


def of_profile(name: str, stage: str) -> dict[str, Any]:
    """Return what a profile gives to a notebook: the values of `all` that the notebook declares,
    then those of its own section.
    """
    sections = profiled(name)
    known = declared(stage)
    general = {"profile": name} | sections.get("all", {})
    own = merged(sections.get(stage, {}), known, f"{name}.yaml, {stage}: ")
    return {key: value for key, value in general.items() if key in known} | own
