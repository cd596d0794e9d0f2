"""Where an audit's encoders and images come from: encoders by name, data sets, folders, and our own
pairs.
"""

from pathlib import Path

from dejavu_utils.data import boxes, datasets, manifests
from dejavu_utils.data.images import Images
from dejavu_utils.models import external
from dejavu_utils.models.pairs import Pair

SETS = {
    "images": "IMAGES",
    "public": "PUBLIC",
    "held_out": "HELD_OUT",
}  # and what `make audit` calls them
ENCODERS = {"target": "ENCODER", "reference": "REFERENCE"}
FILES = {"target": "weights", "reference": "reference_weights"}  # parameters of their weights


def pictures(name: str, what: str = "IMAGES") -> Images:
    """Return a data set by the name of its manifest ("pets"), also with its place
    ("pets:/my/copy"), or from a folder
    or zip: see boxes.folder.
    """
    known, _, place = name.partition(":")
    if known in manifests.names():
        return datasets.read(known, place or None)
    if not name or not Path(name).exists():
        raise FileNotFoundError(
            f"{what}: {name or 'nothing was passed'}; expected a folder of class folders, or a "
            f"data set of {', '.join(manifests.names())}, or one and its place: pets:/my/copy."
        )
    return boxes.folder(Path(name), what)


def given(params: dict) -> tuple[dict[str, str], dict[str, Images], str]:
    """Return (encoders, images, data set) that `params` name: {"target", "reference"} -> encoder,
    see `external.encoder` and `pictures`.

    The data set is the name of the audited images' manifest (or their folder).
    """
    sets, wanted = params["sets"], params["encoder"]
    specs = {which: wanted[which] for which in ENCODERS if wanted[which]}
    for which, spec in specs.items():  # before pictures are read, which takes longer
        try:
            external.check(spec, wanted[FILES[which]])
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{ENCODERS[which]}: {error}") from None
    names = {which: sets[which] for which in SETS if sets[which] or which != "held_out"}
    images = {which: pictures(name, SETS[which]) for which, name in names.items()}
    return specs, images, sets["images"].partition(":")[0]


def demonstration(params: dict, pair: Pair) -> tuple[dict[str, str], dict[str, Images], str]:
    """Return what `given` does, of a trained pair of ours: A is audited on the images that it was
    trained on.

    `sets` may name other parts of the split, such as "b" for `images`: then the audit must say no.
    `encoder.reference` "B" takes encoder B as the second model.
    """
    usual = {"images": "a", "public": "public", "held_out": "control"}
    wanted = {which: params["sets"][which] or part for which, part in usual.items()}
    models = {
        which: name
        for which, name in (("target", "A"), ("reference", params["encoder"]["reference"]))
        if name
    }
    unknown = [name for name in wanted.values() if name not in pair.parts]
    if unknown := unknown + [name for name in models.values() if name not in pair.jobs]:
        raise ValueError(
            f"{unknown[0]!r} is neither a part of our own pair's images ({', '.join(pair.parts)}) "
            "nor "
            "one of its encoders, A and B. To audit another encoder, pass it, too (ENCODER)."
        )
    files = {
        which: str(pair.jobs[name].checkpoint(params["epochs"][-1]))
        for which, name in models.items()
    }
    return files, {which: pair.parts[part] for which, part in wanted.items()}, params["dataset"]
