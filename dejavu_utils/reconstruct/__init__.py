"""Pictures drawn from a representation, and how often a classifier reads them right."""

from dejavu_utils import lazily

NAMES = {
    "bench": "sample",
    "choose": "sample",
    "cost": "sample",
    "draw": "sample",
    "gallery": "sample",
    "redrawn": "sample",
    "summary": "sample",
    "table": "sample",
}
__getattr__, __dir__, __all__ = lazily(__name__, NAMES)
