"""Encoders: networks, criteria, views, training, pairs, and other people's encoders."""

from dejavu_utils import lazily

NAMES = {
    "Encoder": "encoders",
    "embed": "encoders",
    "trunk": "encoders",
}
__getattr__, __dir__, __all__ = lazily(__name__, NAMES)
