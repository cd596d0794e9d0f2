"""The rooms and their files, loaded on first use: `import dejavu_utils as dv` takes no time.

`dv.crops` is the file attack/crops.py, whatever room it stands in; `dv.attack.score` a function of
a file of that room. Each loads what it needs when it is first named.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

__version__ = "0.1.0"


def _files() -> dict[str, str]:
    """Return {name: dotted name} of every room and file of the package, rooms first."""
    here = Path(__file__).parent
    rooms = {
        path.parent.name: f"{__name__}.{path.parent.name}" for path in here.glob("*/__init__.py")
    }
    found = {}
    for path in sorted(here.rglob("[a-z]*.py")):
        parts = path.relative_to(here).with_suffix("").parts
        found[path.stem] = ".".join([__name__, *parts])
    return found | rooms


def lazily(package: str, names: dict[str, str]) -> tuple[Callable, Callable, list[str]]:
    """Return __getattr__, __dir__ and __all__ of a room that offers {name: its file}."""

    def load(name: str) -> object:
        if name in names:
            return getattr(importlib.import_module(f"{package}.{names[name]}"), name)
        raise AttributeError(
            f"module {package!r} has no attribute {name!r}; it has {', '.join(sorted(names))}"
        )

    return load, lambda: sorted(names), sorted(names)


_FILES = _files()
__all__ = sorted(["start", *_FILES])


def __getattr__(name: str) -> object:
    if name == "start":
        return importlib.import_module(f"{__name__}.notebook").start
    if name in _FILES:
        return importlib.import_module(_FILES[name])
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return __all__
