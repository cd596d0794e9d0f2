"""An audit of one encoder: what it looks at, its verdict, its report."""

from dejavu_utils import lazily

NAMES = {
    "Report": "audit",
    "Settings": "settings",
    "by_class": "estimate",
    "classify": "evidence",
    "controls": "checks",
    "examine": "audit",
    "infer": "evidence",
    "load": "audit",
    "members_minus_held_out": "estimate",
    "part": "evidence",
    "run": "audit",
    "scores": "estimate",
    "table": "evidence",
    "verdict": "conclusion",
}
__getattr__, __dir__, __all__ = lazily(__name__, NAMES)
