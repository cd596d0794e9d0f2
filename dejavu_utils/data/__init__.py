"""Pictures: what they are, how they are read, made and split."""

from dejavu_utils import lazily

NAMES = {
    "Images": "images",
    "partition": "split",
    "parts": "split",
    "read": "datasets",
}
__getattr__, __dir__, __all__ = lazily(__name__, NAMES)
