"""`Settings`: what an audit may be told, checked once."""

from dataclasses import dataclass, field
from typing import Any

from dejavu_utils.attack import crops
from dejavu_utils.limited import LIMIT_GIB

CLASSIFIERS = ("naive_bayes", "network")
CROP = crops.CROP | {"min_side": 0}


@dataclass(frozen=True)
class Settings:
    """The settings of one audit; ValueError names the one that makes no sense."""

    k: int = 20  # public neighbours that vote
    margin: float = 0.05  # the score that would matter, a share
    limit: int = 3000  # pictures of a set that are attacked at most; 0: all
    labels: bool = True  # False: pictures without classes, by measures that need none
    classifier: str = "naive_bayes"  # the reference of one model; "network" is slower
    crop: dict = field(default_factory=dict)  # see crops.background; min_side 0: what fits
    layer: str = ""  # the one to judge; "": the projector's output where there is one
    size: int = 0  # px of the squares that the encoder sees; 0: what the encoder wants
    prefix: str = ""  # see external.encoder
    unused: str = ""  # see external.encoder
    seed: int = 0  # of folds and samples
    limit_gib: float = LIMIT_GIB  # GiB that reading one file, or one set of pictures, may take
    dataset: str = (
        ""  # the manifest whose min_side holds; "": that of the members, if they have one
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop", CROP | self.crop)
        self._check("k", self.k >= 1, "1 or more neighbours")
        self._check("margin", 0 < self.margin < 1, "a share between 0 and 1, such as 0.05")
        self._check("limit", self.limit >= 0, "a number of pictures, or 0 for all")
        self._check("size", self.size >= 0, "px, or 0 for what the encoder wants")
        self._check("limit_gib", self.limit_gib > 0, "GiB of memory, more than 0")
        self._check("classifier", self.classifier in CLASSIFIERS, f"one of {CLASSIFIERS}")

        unknown = sorted(set(self.crop) - set(CROP))
        self._check("crop", not unknown, f"only the keys {', '.join(CROP)}")
        self._check("crop", self.crop["kind"] in crops.KINDS, f"a kind of {crops.KINDS}")

    def _check(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            raise ValueError(f"audit: {name} = {getattr(self, name)!r}; expected {expected}.")

    @classmethod
    def of(cls, params: dict[str, Any]) -> "Settings":
        """Return the settings that the parameters of the notebook 05_audit stand for."""
        reading, audit = params["reading"], params["audit"]
        return cls(
            k=params["k"],
            margin=audit["margin"],
            limit=audit["limit"],
            labels=audit["labels"],
            classifier=audit["classifier"],
            crop=params["crop"],
            layer=reading["layer"],
            size=reading["size"],
            prefix=reading["prefix"],
            unused=reading["unused"],
            seed=params["seeds"][0],
            limit_gib=audit["limit_gib"],
            dataset="" if params["encoder"]["target"] else params["dataset"],
        )
