"""Engines: what trains a recipe, by name. Each is a module with `fit(job)` and `constants()`.

They are named as text and loaded when one is wanted: VISSL's and the decoder's stand above this
room, and need what is in it.
"""

import importlib
from types import ModuleType

ENGINES = {
    "own": "dejavu_utils.models.train",
    "vissl": "dejavu_utils.vissl_engine",
    "decoder": "dejavu_utils.reconstruct.decoder",
}


def load(name: str) -> ModuleType:
    """Return the module of an engine; ValueError names those that there are."""
    if name not in ENGINES:
        raise ValueError(f'engine "{name}" is not known: expected one of {", ".join(ENGINES)}')
    return importlib.import_module(ENGINES[name])
