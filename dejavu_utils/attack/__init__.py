"""Label inference: crops, nearest neighbours, votes, the score, references and other measures."""

from dejavu_utils import lazily

NAMES = {
    "curve": "scoring",
    "difference": "scoring",
    "four_way": "scoring",
    "infer": "inference",
    "label_inference": "inference",
    "over_seeds": "scoring",
    "score": "scoring",
}
__getattr__, __dir__, __all__ = lazily(__name__, NAMES)
