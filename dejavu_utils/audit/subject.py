"""What an audit looks at: an encoder, its training images, unseen and public ones; checked and made
comparable.
"""

import difflib
import hashlib
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from dejavu_utils.attack import crops, knn
from dejavu_utils.audit import sources
from dejavu_utils.data import boxes, manifests
from dejavu_utils.data.images import Images
from dejavu_utils.models import external
from dejavu_utils.models.external import External

MINIMUM = 20  # attacked images; fewer say nothing
# grey levels of 255, root mean square over thumbnails of 8 px: closer pictures count as the same
ALIKE = 3


@dataclass(frozen=True, eq=False)
class Subject:
    """Encoder and images of an audit; every attacked image has a background crop, and labels mean
    the same in all.
    """

    encoder: External
    reference: External | None  # a second model, said to be trained without the audited images
    audited: Images  # said to be training images
    unseen: Images | None  # said to be in no training set; they calibrate the score
    source: str  # of `unseen`: "held-out", "public" (a part of X stands in) or "" (none)
    public: Images
    crop: dict
    size: int  # px of the squares that the encoder sees
    layers: tuple[str, ...]  # the first one is judged
    notes: tuple[str, ...]  # what was read, left out or replaced
    assumed: tuple[str, ...] = ()  # of the encoder: what no file and no configuration told

    @property
    def attacked(self) -> dict[str, Images]:
        """The attacked sets: "audited" and, if there are any, "unseen" images."""
        return {"audited": self.audited} | ({"unseen": self.unseen} if self.source else {})

    @property
    def limits(self) -> list[str]:
        """What the audit cannot check, and what was assumed, as sentences."""
        trust = {
            "held-out": "Whether the held-out images are like the audited ones, and were really "
            "not trained on.",
            "public": f"No held-out images were passed: {len(self.unseen or ())} public ones "
            "stand in for them. "
            "Were those trained on, or unlike the audited ones, the calibrated score is wrong.",
            "": "No held-out images were passed, and too few public ones have a background crop "
            "to stand in: the "
            "offset of the reference is not known, and two of three negative controls could not "
            "be run.",
        }
        second = ["Whether the second model was trained alike, and without the audited images."]
        return [
            "Whether public images were training images, too: an encoder does not tell. If they "
            "were (many "
            "published encoders saw all of ImageNet), the score may be too low or too high.",
            "Whether the audited images were training images at all: if not, “no evidence” is the "
            "right answer.",
            "Public pictures that are cut, mirrored or recoloured copies of audited ones: only "
            "close thumbnails "
            "were looked for.",
            "Whether a box holds all of the object: what shows outside would be recognition, not "
            "memory.",
            "Single images: memory and luck cannot be told apart for one image, only for the set.",
            trust[self.source],
            *second[: self.reference is not None],
            *(f"Assumed of the encoder: {note}." for note in self.assumed),
            *(f"Of encoder and images: {note}." for note in self.notes),
        ]

    def squares(self, images: Images, size: int) -> torch.Tensor:
        """Return the background crops of attacked images, uint8 (n, 3, size, size)."""
        return images.squares(size, self.rects(images))

    def rects(self, images: Images) -> np.ndarray:
        """Return where the background crops are, (n, 4) px."""
        return crops.background(images, self.crop)[0]


def _aligned(images: Images, classes: list[str]) -> Images:
    """Return the pictures of these classes, their labels renumbered to be places in `classes`."""
    place = {name: i for i, name in enumerate(classes)}
    labels = np.array([place.get(name, -1) for name in images.classes], np.int64)[images.labels]
    return replace(images.subset(labels >= 0), labels=labels[labels >= 0], classes=tuple(classes))


def _same(images: Images, *others: Images) -> np.ndarray:
    """Return which pictures look like one of `others`, bool (n,): their thumbnails of 8 px are
    close.
    """
    found = np.zeros(len(images), bool)
    for other in others:
        if len(images) and len(other):
            one, two = (each.squares(8).flatten(1).float() for each in (images, other))
            found |= (knn.search(one, two, 1)[0][:, 0] <= one.shape[1] * ALIKE**2).numpy()
    return found


def _crop(crop: dict, dataset: str, images: Images) -> tuple[dict, list[str]]:
    """Return the crop for all sets, and a note: corners where there are no boxes; min_side 0 is
    what fits the data.
    """
    if crop["kind"] == "periphery" and not any(map(len, images.boxes)):
        return crop | {"kind": "corner"}, [
            "the images have no boxes, so corners are cropped, which may show a part "
            "of the object: a part of the score may be recognition, not memory"
        ]
    usual = (
        manifests.read(dataset)["min_side"]
        if dataset in manifests.names()
        else np.median(images.sizes.min(1)) // 4
    )
    return crop | {"min_side": crop["min_side"] or int(usual)}, []


def _attackable(images: Images, crop: dict, limit: int, seed: int) -> Images:
    """Return the pictures that have a background crop, at most `limit`, drawn by the sha256 of
    (seed, id); 0: all.
    """
    images = images.subset(crops.background(images, crop)[1])
    order = np.argsort(
        [hashlib.sha256(f"{seed}/audit/{name}".encode()).hexdigest() for name in images.ids]
    )
    return images.subset(np.sort(order[: limit or None]))


def _stand_in(public: Images, crop: dict, limit: int, seed: int) -> Images:
    """Return public pictures to attack as unseen ones where nobody gave any: every fourth of its
    class, with a crop.
    """
    place = pd.Series(public.labels).groupby(public.labels).cumcount()
    return _attackable(public.subset(place.to_numpy() % 4 == 3), crop, limit, seed)


def load(params: dict, files: dict[str, str], images: dict[str, Images], dataset: str) -> Subject:
    """Return the subject of what sources.given or sources.demonstration found; its encoders are
    read here.
    """
    how = {name: params["reading"][name] for name in ("prefix", "unused")}
    encoders = {}
    for which, spec in files.items():
        file = params["encoder"][sources.FILES[which]]
        encoders[which] = external.encoder(spec, file, **how)
    return prepare(encoders, images, params, dataset)


def prepare(encoders: dict, images: dict[str, Images], params: dict, dataset: str = "") -> Subject:
    """Return the subject of {"target", "reference"} -> encoder and {"images", "public",
    "held_out"} -> Images.

    Classes are matched by name. Public pictures that look like an attacked one are left out (its
    crop would find the picture itself), and held-out ones that look like a training image. Where no
    images are held out, a part of X is attacked instead. `params`: reading, audit, crop, k, seeds.
    ValueError says which set is too small, and for what.
    """
    target, reference = encoders["target"], encoders.get("reference")
    given, limit, seed = images["images"], params["audit"]["limit"], params["seeds"][0]
    crop, notes = _crop(params["crop"], dataset, given)
    for name, each in images.items():
        if left_out := boxes.unused(each):
            notes.append(f"{sources.SETS.get(name, name)}: {left_out}")
    audited = _attackable(given, crop, limit, seed)
    classes = [
        given.classes[label] for label in np.flatnonzero(np.bincount(audited.labels) > 1)
    ]  # to judge by others
    _enough(audited, given, crop, "IMAGES", len(classes))
    none = given.subset(np.zeros(len(given), bool))
    given, public, held = (
        _aligned(images.get(name, none), classes) for name in ("images", "public", "held_out")
    )
    if lost := len(np.unique(audited.labels)) - len(classes):
        notes.append(f"{lost} classes with one usable image were left out")
    trained = _same(held, given)
    held = held.subset(~trained)
    alike = _same(public, given, held)
    public = public.subset(~alike)
    notes += [
        f"{drop.sum()} {name} pictures look like one of the {others} and were left out"
        for drop, name, others in (
            (trained, "held-out", "training images"),
            (alike, "public", "attacked images"),
        )
        if drop.any()
    ]
    audited, unseen = _aligned(audited, classes), _attackable(held, crop, limit, seed)
    source = "held-out" if "held_out" in images else "public"
    if source == "public":
        unseen = _stand_in(public, crop, 2 * len(audited), seed)
        source = "public" if len(unseen) >= MINIMUM else ""
        public = public.subset(~np.isin(public.ids, unseen.ids)) if source else public
    else:
        _enough(unseen, held, crop, "HELD_OUT", len(classes))
    _covers(public, images["public"].classes, int(alike.sum()), params["k"])
    size, assumed = _side(params["reading"]["size"] or target.size, target, given)
    return Subject(
        target,
        reference,
        audited,
        unseen if source else None,
        source,
        public,
        crop,
        size,
        _layers(target, reference, params["reading"]["layer"]),
        (*target.notes, *notes),
        (*target.assumed, *assumed),
    )


def _enough(usable: Images, given: Images, crop: dict, what: str, classes: int) -> None:
    """Raise ValueError unless there are images enough, of two classes at least."""
    if classes < 2:
        raise ValueError(
            f"{what}: two or more usable images of {classes} classes; at least 2 classes are "
            "needed, "
            "else any guess is right. Pass more images."
        )
    if len(usable) < MINIMUM:
        smaller = (
            f", a crop.min_side below {crop['min_side']} px" if crop["kind"] == "periphery" else ""
        )
        raise ValueError(
            f"{what}: {len(usable)} of {len(given)} pictures have a usable {crop['kind']} crop, "
            "at least "
            f"{MINIMUM} are needed. Pass more pictures{smaller}, or crop.kind=corner."
        )


def _covers(public: Images, there: tuple[str, ...], alike: int, k: int) -> None:
    """Raise ValueError unless X, whose own classes are `there`, has every class that is attacked,
    and k pictures.
    """
    missing = [
        name
        for label, name in enumerate(public.classes)
        if label not in set(public.labels.tolist())
    ]
    left_out = f" ({alike} were left out: they look like attacked ones)" if alike else ""
    if missing:
        meant = _nearest(missing[0], there)
        raise ValueError(
            f"PUBLIC: no picture of {len(missing)} of {len(public.classes)} classes of IMAGES, "
            f"such as {missing[0]!r}{meant}{left_out}; its neighbours could never name it. Pass "
            "public pictures of every class, whose folders have the same names, and which are no "
            "training images."
        )
    if len(public) < k:
        raise ValueError(
            f"PUBLIC: {len(public)} pictures{left_out}, fewer than k = {k} neighbours. Pass more, "
            "or a "
            "smaller k."
        )


def _nearest(name: str, there: tuple[str, ...]) -> str:
    """Return the class that may have been meant, with its quotes: it may differ by a blank only."""
    if name in there:
        return ""
    plain = {each.strip().casefold(): each for each in there}
    close = difflib.get_close_matches(name.strip().casefold(), plain, 1)
    return f" (PUBLIC has {plain[close[0]]!r})" if close else ""


def _side(size: int, encoder: External, images: Images) -> tuple[int, list[str]]:
    """Return the side (px) of the squares that the encoder sees, and a note if it had to be
    assumed.
    """
    if size:
        return size, []
    convolutions = (m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d))
    stem = next(convolutions, None)
    size = 224
    if stem is not None and stem.kernel_size[0] < 7:  # made for small pictures
        size = min(size, int(np.median(images.sizes.min(1))))
    return size, [f"input of {size} px (set reading.size)"]


def _names(encoder: External) -> list[str]:
    """Return the layers of an encoder, as its `layers` names them."""
    blocks = len(encoder.projector)
    return ["backbone", *(f"block{i}" for i in range(1, blocks)), *["projector"][:blocks]]


def _layers(target: External, reference: External | None, wanted: str) -> tuple[str, ...]:
    """Return the layers to look at, the one to judge first: the projector's output where there is
    one.
    """
    judged = wanted or _names(target)[-1]
    for name, one in (("encoder", target), ("reference model", reference)):
        if one is not None and judged not in _names(one):
            raise ValueError(
                f"reading.layer: the {name} has no layer {judged!r}, it has "
                f"{', '.join(_names(one))}. "
                "Pass reading.layer=backbone, which all have."
            )
    return tuple(dict.fromkeys((judged, "backbone")))
