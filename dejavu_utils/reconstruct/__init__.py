"""Pictures sampled from a representation, and how often a classifier reads them right."""

from dejavu_utils import lazily

NAMES = {
    "gallery": "sample",
    "pictures": "sample",
    "prepare": "sample",
    "representations": "sample",
    "table": "sample",
    "whole": "sample",
}
__getattr__, __dir__, __all__ = lazily(__name__, NAMES)
