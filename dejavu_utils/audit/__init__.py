"""An audit of one encoder: what it looks at, its verdict, its report."""

from dejavu_utils import lazily

NAMES = {
    "by_class": "audit",
    "controls": "audit",
    "infer": "audit",
    "judge": "audit",
    "part": "audit",
    "scores": "audit",
    "table": "audit",
    "verdict": "audit",
}
__getattr__, __dir__, __all__ = lazily(__name__, NAMES)
