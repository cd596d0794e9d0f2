"""What an audit looks at: an encoder, its members, held-out and public pictures, made comparable.

Members are said to be training images; held-out ones are said to be in no training set.
"""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dejavu_utils.attack import crops, knn
from dejavu_utils.audit import sources
from dejavu_utils.audit.settings import Settings
from dejavu_utils.data import datasets, manifests
from dejavu_utils.data.images import Images
from dejavu_utils.models.encoders import Encoder

BOXED = 300  # members at most whose boxes are looked into
MINIMUM = 20  # attacked images; fewer say nothing
THUMBNAIL = 8  # px
# grey levels of 255, root mean square over thumbnails; closer pictures count as the same
ALIKE = 3


# what cannot be checked: with classes, and without
LABELLED = (
    "Whether public images were training images, too: an encoder does not tell. If they were (many "
    "published encoders saw all of ImageNet), the score may be too low or too high.",
    "Public pictures that are cut, mirrored or recoloured copies of members: only close thumbnails "
    "were looked for.",
    "Whether a box holds all of the object: what shows outside would be recognition, not memory.",
)
UNLABELLED = (
    "What is remembered: without classes nobody can ask the encoder for what a member shows. That "
    "members can be told from held-out pictures is membership; it may be ordinary overfitting.",
    "Whether held-out pictures that are cut, mirrored or recoloured copies of members are among "
    "them: only close thumbnails were looked for.",
)


@dataclass(frozen=True, eq=False)
class Subject:
    """Encoder and images of an audit; every attacked image has a background crop, and labels mean
    the same in all sets.
    """

    encoder: Encoder
    reference: Encoder | None  # a second model, said to be trained without the members
    members: Images
    held_out: Images | None
    source: str  # of `held_out`: "held-out", "public" (a part of X stands in) or "" (none)
    public: Images
    crop: dict
    size: int  # px of the squares that the encoder sees
    layers: tuple[str, ...]  # the first one is judged
    notes: tuple[str, ...]  # what was read, left out or replaced
    assumed: tuple[str, ...] = ()  # of the encoder: what no file and no configuration told

    @property
    def attacked(self) -> dict[str, Images]:
        """The attacked sets: "members" and, if there are any, "held-out" images."""
        sets = {"members": self.members}
        if self.held_out is not None:
            sets["held-out"] = self.held_out
        return sets

    @property
    def labelled(self) -> bool:
        """Whether the pictures have classes, and public ones can name them."""
        return len(self.public) > 0

    @property
    def boxed(self) -> int:
        """How many members, the first ones, have their boxes looked into (see checks.boxes)."""
        return min(BOXED, len(self.members)) if self.crop["kind"] == "periphery" else 0

    @property
    def limits(self) -> list[str]:
        """What the audit cannot check, and what was assumed, as sentences."""
        found = [
            "Whether the members were training images at all: if not, “no evidence” is the right "
            "answer.",
            "Single images: memory and luck cannot be told apart for one image, only for the set.",
            self._trust_in_held_out(),
        ]
        found += LABELLED if self.labelled else UNLABELLED
        if self.reference is not None:
            found.append("Whether the second model was trained alike, and without the members.")
        if self.owners(self.members) is not None:
            found.append(self._trust_in_owners())
        found += [f"Assumed of the encoder: {note}." for note in self.assumed]
        return found + [f"Noted: {note}." for note in self.notes]

    def _trust_in_held_out(self) -> str:
        if self.source == "held-out":
            return "Whether the held-out images are like the members, and were not trained on."
        if self.source == "public":
            return (
                f"No held-out images were passed: {len(self.held_out)} public ones stand in for "
                "them. Were those trained on, or unlike the members, the score is wrong."
            )
        return (
            "No held-out images were passed, and too few public ones have a background crop to "
            "stand in: the offset of the reference is not known, and most negative controls could "
            "not be run."
        )

    def _trust_in_owners(self) -> str:
        owners = {name: set(self.owners(images)) for name, images in self.attacked.items()}
        counts = " and ".join(f"{len(each)} of {name}" for name, each in owners.items())
        both = len(set.intersection(*owners.values())) if len(owners) > 1 else 0
        return (
            "Whether owners are independent of each other: the intervals of scores, controls and "
            f"AUC draw owners ({counts}, {both} in both; a picture without one counts as one). "
            "Those of TPR and the bound of ε take pictures as independent."
        )

    def owners(self, images: Images) -> np.ndarray | None:
        """Return the owner of each attacked image (n,), a name of its own for one without; None
        where no attacked image has one.
        """
        if not any("owner" in each.attributes for each in self.attacked.values()):
            return None
        nobody = np.array([f"nobody: {name}" for name in images.ids], object)
        owners = images.attributes.get("owner", np.full(len(images), "")).astype(object)
        return np.where(owners == "", nobody, owners)

    def squares(self, images: Images, size: int) -> Tensor:
        """Return the background crops of attacked images, uint8 (n, 3, size, size)."""
        return images.squares(size, self.rects(images))

    def rects(self, images: Images) -> np.ndarray:
        """Return where the background crops are, (n, 4) px."""
        return crops.background(images, self.crop)[0]


def prepare(
    encoder: Encoder,
    images: Images,
    public: Images,
    held_out: Images | None = None,
    reference: Encoder | None = None,
    settings: Settings | None = None,
) -> Subject:
    """Return the subject of an audit; ValueError says which set is too small, and for what.

    Classes are matched by name. Pictures that look like an earlier one of their set are left out;
    so are held-out pictures that look like a training image, and public ones that look like either
    (a crop would find the picture itself). Without held-out images a part of X stands in for them.
    """
    settings = settings or Settings()
    notes = _files_not_used({"images": images, "public": public, "held_out": held_out})
    crop, note = _crop(settings, images)
    notes += note
    layers = _layers(encoder, reference, settings.layer)

    # members, and the classes that another member tells apart
    trained, note = _without_repeats(_Pictures.of(images), "IMAGES")
    notes += note
    members = _attackable(trained.images, crop, settings)
    classes = _classes(members)
    _check_enough(members, images, crop, "IMAGES", len(classes))
    notes += _not_attacked(members, trained.images, "IMAGES")
    if lost := len(np.unique(members.labels)) - len(classes):
        notes.append(f"{lost} classes with one usable image were left out")
    members = _aligned(members, classes)

    # held-out images, and public ones, which are none of the others
    fresh = _aligned(_or_none(held_out, images), classes)
    notes += _of_other_classes(held_out, fresh, "HELD_OUT")
    fresh, copies_of_trained = _apart(_Pictures.of(fresh), trained)
    notes += copies_of_trained
    known = _aligned(public, classes)
    notes += _of_other_classes(public, known, "PUBLIC")
    known = _Pictures.of(known)
    before = len(known.images)
    known, note = _without_copies(known, [trained, fresh], "public", "attacked images")
    notes += note
    copies = before - len(known.images)

    source, unseen, bank = _held_out(fresh.images, held_out, known.images, members, crop, settings)
    if source == "held-out":
        _check_enough(unseen, fresh.images, crop, "HELD_OUT", len(classes), copies_of_trained)
        notes += _not_attacked(unseen, fresh.images, "HELD_OUT")
    _check_covers(bank, public.classes, copies, settings.k)

    size, assumed = _side(settings.size, encoder, trained.images)
    return Subject(
        encoder,
        reference,
        members,
        unseen,
        source,
        bank,
        crop,
        size,
        layers,
        (*getattr(encoder, "notes", ()), *notes),
        (*getattr(encoder, "assumed", ()), *assumed),
    )


def prepare_unlabelled(
    encoder: Encoder,
    images: Images,
    held_out: Images,
    reference: Encoder | None = None,
    settings: Settings | None = None,
) -> Subject:
    """Return the subject of an audit without labels: no public pictures, corner crops, one class.

    Pictures that look like others are left out as in `prepare`; errors are the same.
    """
    settings = settings or Settings()
    notes = _files_not_used({"images": images, "held_out": held_out})
    crop = settings.crop | {"kind": "corner"}
    layers = _layers(encoder, reference, settings.layer)

    trained, note = _without_repeats(_Pictures.of(images), "IMAGES")
    notes += note
    fresh, copies_of_trained = _apart(_Pictures.of(held_out), trained)
    notes += copies_of_trained

    members = _attackable(trained.images, crop, settings)
    unseen = _attackable(fresh.images, crop, settings)
    _check_enough(members, images, crop, "IMAGES", None)
    _check_enough(unseen, fresh.images, crop, "HELD_OUT", None, copies_of_trained)
    notes += _not_attacked(members, trained.images, "IMAGES")
    notes += _not_attacked(unseen, fresh.images, "HELD_OUT")
    size, assumed = _side(settings.size, encoder, trained.images)
    return Subject(
        encoder,
        reference,
        members,
        unseen,
        "held-out",
        images.subset([]),
        crop,
        size,
        layers,
        (*getattr(encoder, "notes", ()), *notes),
        (*getattr(encoder, "assumed", ()), *assumed),
    )


# -- pictures that are the same ---------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Pictures:
    """Pictures and their thumbnails, by which equal ones are found, mirrored ones too: training
    mirrors pictures itself.
    """

    images: Images
    thumbnails: Tensor  # (n, 192)

    @classmethod
    def of(cls, images: Images) -> "_Pictures":
        squares = images.squares(THUMBNAIL)  # (n, 3, 8, 8)
        return cls(images, squares.flatten(1).float())

    @property
    def mirrored(self) -> Tensor:
        """Return the thumbnails of the mirrored pictures, (n, 192)."""
        squares = self.thumbnails.unflatten(1, (3, THUMBNAIL, THUMBNAIL))
        return squares.flip(3).flatten(1)

    def kept(self, keep: np.ndarray) -> "_Pictures":
        return _Pictures(self.images.subset(keep), self.thumbnails[torch.from_numpy(keep)])


def _without_repeats(pictures: _Pictures, what: str) -> tuple[_Pictures, list[str]]:
    """Return the pictures that look like no earlier one of their set, and a note of the rest."""
    n = len(pictures.images)
    if n < 2:
        return pictures, []
    near = min(8, n)
    repeats = np.zeros(n, bool)
    for thumbnails in (pictures.thumbnails, pictures.mirrored):
        distances, rows = knn.search(thumbnails, pictures.thumbnails, near)  # (n, near)
        earlier = rows < torch.arange(n)[:, None]
        close = distances <= _threshold(thumbnails)
        repeats |= (earlier & close).any(1).numpy()
    if not repeats.any():
        return pictures, []
    note = f"{what}: {repeats.sum()} pictures look like an earlier one and were left out"
    return pictures.kept(~repeats), [note]


def _without_copies(
    pictures: _Pictures, others: list[_Pictures], what: str, those: str
) -> tuple[_Pictures, list[str]]:
    """Return the pictures that look like none of `others`, and a note of the rest."""
    copies = np.zeros(len(pictures.images), bool)
    for other in others:
        for thumbnails in (pictures.thumbnails, pictures.mirrored):
            if len(copies) and len(other.images):
                distances, _ = knn.search(thumbnails, other.thumbnails, 1)  # (n, 1)
                copies |= (distances[:, 0] <= _threshold(thumbnails)).numpy()
    if not copies.any():
        return pictures, []
    note = f"{copies.sum()} {what} pictures look like one of the {those} and were left out"
    return pictures.kept(~copies), [note]


def _apart(held_out: _Pictures, trained: _Pictures) -> tuple[_Pictures, list[str]]:
    """Return the held-out pictures that look neither like an earlier one of their set nor like a
    training image, and notes of the rest.
    """
    once, repeats = _without_repeats(held_out, "HELD_OUT")
    fresh, copies = _without_copies(once, [trained], "held-out", "training images")
    return fresh, repeats + copies


def _threshold(thumbnails: Tensor) -> float:
    """Return the squared distance up to which thumbnails count as the same."""
    return thumbnails.shape[1] * ALIKE**2


# -- which pictures, and of which classes -----------------------------------------------------


def _files_not_used(sets: dict[str, Images | None]) -> list[str]:
    """Return a line for each set of which files could not be used."""
    notes = []
    for name, images in sets.items():
        left_out = datasets.unused(images) if images is not None else ""
        if left_out:
            notes.append(f"{sources.SETS[name]}: {left_out}")
    return notes


def _not_attacked(attacked: Images, usable: Images, what: str) -> list[str]:
    """Return a note of the pictures without a background crop, or beyond the limit."""
    n = len(usable) - len(attacked)
    why = "have no background crop that is large enough, or are beyond audit.limit"
    return [f"{what}: {n} of {len(usable)} pictures {why}"] if n else []


def _of_other_classes(given: Images | None, kept: Images, what: str) -> list[str]:
    """Return a note of the pictures of classes that no member has."""
    n = 0 if given is None else len(given) - len(kept)
    return [f"{what}: {n} pictures are of classes that are not attacked"] if n else []


def _or_none(images: Images | None, others: Images) -> Images:
    """Return the images, or no image of the classes of `others`."""
    return others.subset(np.zeros(len(others), bool)) if images is None else images


def _crop(settings: Settings, images: Images) -> tuple[dict, list[str]]:
    """Return the crop for all sets, and a note: corners where there are no boxes; min_side 0 is
    what fits the data.
    """
    crop = settings.crop
    if crop["kind"] == "periphery" and not any(map(len, images.boxes)):
        note = (
            "the images have no boxes, so corners are cropped, which may show a part of the "
            "object: a part of the score may be recognition, not memory"
        )
        return crop | {"kind": "corner"}, [note]

    if crop["min_side"]:
        return crop, []
    if settings.dataset in sources.data_sets():
        return crop | {"min_side": manifests.read(settings.dataset)["min_side"]}, []
    shorter = np.median(images.sizes.min(1))
    return crop | {"min_side": int(shorter // 4)}, []


def _attackable(images: Images, crop: dict, settings: Settings, limit: int = -1) -> Images:
    """Return the pictures that have a background crop, at most `limit` (settings.limit; 0: all),
    drawn by the sha256 of (seed, id).
    """
    images = images.subset(crops.background(images, crop)[1])
    names = [f"{settings.seed}/audit/{name}" for name in images.ids]
    order = np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names])
    limit = settings.limit if limit < 0 else limit
    drawn = order[:limit] if limit else order
    return images.subset(np.sort(drawn))


def _classes(members: Images) -> list[str]:
    """Return the classes of two members or more: each is judged by a classifier of the others."""
    count = np.bincount(members.labels, minlength=len(members.classes))
    return [name for name, n in zip(members.classes, count, strict=True) if n > 1]


def _aligned(images: Images, classes: list[str]) -> Images:
    """Return the pictures of these classes, their labels renumbered to be places in `classes`."""
    place = {name: i for i, name in enumerate(classes)}
    new = np.array([place.get(name, -1) for name in images.classes], np.int64)
    labels = new[images.labels]
    kept = images.subset(labels >= 0)
    return replace(kept, labels=labels[labels >= 0], classes=tuple(classes))


def _held_out(
    fresh: Images,
    passed: Images | None,
    public: Images,
    members: Images,
    crop: dict,
    settings: Settings,
) -> tuple[str, Images | None, Images]:
    """Return (source, held-out images, public images): where none were passed, every fourth public
    picture of its class stands in, if there are enough.
    """
    if passed is not None:
        return "held-out", _attackable(fresh, crop, settings), public

    place = pd.Series(public.labels).groupby(public.labels).cumcount().to_numpy()
    fourth = public.subset(place % 4 == 3)
    unseen = _attackable(fourth, crop, settings, 2 * len(members))
    if len(unseen) < MINIMUM:
        return "", None, public
    return "public", unseen, public.subset(~np.isin(public.ids, unseen.ids))


# -- errors -----------------------------------------------------------------------------------


def _check_enough(
    usable: Images,
    given: Images,
    crop: dict,
    what: str,
    classes: int | None,
    left_out: Sequence[str] = (),
) -> None:
    """Raise ValueError unless there are images enough, of two classes at least (None: of any).

    `left_out` says which others were left out before, and why.
    """
    if classes is not None and classes < 2:
        raise ValueError(
            f"{what}: two or more usable images of {classes} classes; at least 2 classes are "
            "needed, else any guess is right. Pass more images."
        )
    if len(usable) >= MINIMUM:
        return
    advice = "Pass more pictures."
    if crop["kind"] == "periphery":
        advice = (
            f"Pass more pictures, a crop.min_side below {crop['min_side']} px, or crop.kind=corner."
        )
    if left_out:
        advice = f"{'; '.join(left_out)}. Pass more that are none of these."
    raise ValueError(
        f"{what}: {len(usable)} of {len(given)} pictures have a usable {crop['kind']} crop, at "
        f"least {MINIMUM} are needed. {advice}"
    )


def _check_covers(public: Images, there: tuple[str, ...], copies: int, k: int) -> None:
    """Raise ValueError unless X, whose own classes are `there`, has every class that is attacked,
    and k pictures.
    """
    left_out = f" ({copies} were left out: they look like attacked ones)" if copies else ""
    count = np.bincount(public.labels, minlength=len(public.classes))
    missing = [name for name, n in zip(public.classes, count, strict=True) if n == 0]
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
            "or a smaller k."
        )


def _nearest(name: str, there: tuple[str, ...]) -> str:
    """Return the class that may have been meant, with its quotes: it may differ by a blank only."""
    if name in there:
        return ""
    plain = {each.strip().casefold(): each for each in there}
    close = difflib.get_close_matches(name.strip().casefold(), plain, 1)
    return f" (PUBLIC has {plain[close[0]]!r})" if close else ""


# -- the encoder ------------------------------------------------------------------------------


def _side(size: int, encoder: Encoder, images: Images) -> tuple[int, list[str]]:
    """Return the side (px) of the squares that the encoder sees, and a note if it had to be
    assumed.
    """
    size = size or getattr(encoder, "size", 0)
    if size:
        return size, []
    size = 224
    convolutions = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    if convolutions and convolutions[0].kernel_size[0] < 7:  # made for small pictures
        size = min(size, int(np.median(images.sizes.min(1))))
    return size, [f"input of {size} px (set reading.size)"]


def _layers(target: Encoder, reference: Encoder | None, wanted: str) -> tuple[str, ...]:
    """Return the layers to look at, the one to judge first: the projector's output where there is
    one.
    """
    judged = wanted or _names(target)[-1]
    _check_layer(judged, target, "encoder")
    if reference is not None:
        _check_layer(judged, reference, "reference model")
    return (judged,) if judged == "backbone" else (judged, "backbone")


def _check_layer(layer: str, encoder: Encoder, what: str) -> None:
    names = _names(encoder)
    if layer not in names:
        raise ValueError(
            f"reading.layer: the {what} has no layer {layer!r}, it has {', '.join(names)}. Pass "
            "reading.layer=backbone, which all have."
        )


def _names(encoder: Encoder) -> list[str]:
    """Return the layers of an encoder, as its `layers` names them."""
    blocks = len(encoder.projector)
    inner = [f"block{i}" for i in range(1, blocks)]
    return ["backbone", *inner, *["projector"][:blocks]]
