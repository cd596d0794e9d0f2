"""The modules, loaded on first use: the import takes no time, `dv.attack.score` imports what it
needs.
"""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

__version__ = "0.1.0"
__all__ = sorted(["start", *(module.name for module in pkgutil.iter_modules(__path__))])


def __getattr__(name: str) -> ModuleType | Callable:
    if name == "start":
        return importlib.import_module(f"{__name__}.notebook").start
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(
        f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return __all__
