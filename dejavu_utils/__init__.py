"""Public names, loaded on first use: the import takes no time, `dv.attack.score` imports what it needs."""

from __future__ import annotations

import importlib
import pkgutil

__version__ = "0.1.0"

_HOME = {
    "start": "notebook",
    "Images": "data", "read": "data", "partition": "data", "partition_hash": "data", "parts": "data",
    "search": "knn", "vote": "knn",
    "label_inference": "attack", "score": "attack", "four_way": "attack", "difference": "attack",
    "linear_probe": "probe",
}
_MODULES = sorted(module.name for module in pkgutil.iter_modules(__path__))
__all__ = sorted({*_HOME, *_MODULES})


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
