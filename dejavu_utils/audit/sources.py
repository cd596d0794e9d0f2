"""Where an audit's encoders and images come from: files, pretrained models, data sets, folders, and
our own pairs.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from torch import nn

from dejavu_utils import store
from dejavu_utils.data import boxes, datasets, manifests
from dejavu_utils.data.images import Images
from dejavu_utils.models import checkpoints, encoders, own_format, views
from dejavu_utils.models.checkpoints import Foreign
from dejavu_utils.models.pairs import Pair

FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".tar", ".torch")
SETS = {
    "images": "IMAGES",
    "public": "PUBLIC",
    "held_out": "HELD_OUT",
}  # and what `make audit` calls them


def encoder(
    spec: str, layout: str = "auto", which: str = "", trunk: str = ""
) -> tuple[Foreign, int]:
    """Return (encoder, px that it was made for or 0): from a file, or pretrained by its torchvision
    or timm name.
    """
    if _is_file(spec):
        found, side = (
            checkpoints.read(spec, layout, which or None, trunk or None),
            store.sidecar(spec),
        )
        known = json.loads(side.read_text())["parameters"].get("size") if side.is_file() else None
        grid = getattr(getattr(found.trunk, "patch_embed", None), "img_size", None)
        return found, known or (grid or [0])[0]
    try:
        built = encoders.trunk(spec)
    except ValueError as error:
        raise ValueError(
            f"ENCODER: {spec} is no file, and no model has that name: {error}."
        ) from None
    try:
        built, how, library = _pretrained(spec, built)
    except (
        Exception
    ) as error:  # no network, no such weights, a changed page: each library has its own words
        raise ValueError(
            f"ENCODER: the weights of {spec} could not be fetched ({type(error).__name__}: "
            f"{error}). "
            "Pass the encoder as a file."
        ) from error
    notes = [
        f"pretrained weights of {library}, by name; projector: none; input normalisation: the "
        "model's own"
    ]
    weights = b"".join(
        value.contiguous().numpy().tobytes() for value in built.state_dict().values()
    )
    digest = hashlib.sha256(weights).hexdigest()
    return Foreign(
        _normalised(built, how), nn.ModuleList(), library, "student", notes, [], digest
    ).eval(), how["size"]


def _is_file(spec: str) -> bool:
    return Path(spec).is_file() or "/" in spec or spec.endswith(FILES)


def _pretrained(name: str, built: nn.Module) -> tuple[nn.Module, dict, str]:
    """Return (trunk with its weights, {mean, std, size}, library): torchvision's ResNets, all
    others are timm's.
    """
    import timm
    import torchvision

    if name in torchvision.models.list_models():
        weights = torchvision.models.get_model_weights(name).DEFAULT.get_state_dict(check_hash=True)
        own_format.fill(
            built, {key: value for key, value in weights.items() if not key.startswith("fc.")}, name
        )
        return built, {"mean": views.MEAN, "std": views.STD, "size": 224}, "torchvision"
    built = timm.create_model(name, pretrained=True, num_classes=0)
    config = built.pretrained_cfg
    return (
        built,
        {"mean": config["mean"], "std": config["std"], "size": config["input_size"][-1]},
        "timm",
    )


def _normalised(trunk: nn.Module, how: dict) -> nn.Module:
    """Return the trunk for pixels of ImageNet's mean and deviation, which models.embed makes, if it
    wants others.
    """
    from torchvision.transforms import v2

    if (tuple(how["mean"]), tuple(how["std"])) == (views.MEAN, views.STD):
        return trunk
    mean, std, ours, unit = (
        np.array(each) for each in (how["mean"], how["std"], views.MEAN, views.STD)
    )
    return nn.Sequential(
        v2.Normalize(((mean - ours) / unit).tolist(), (std / unit).tolist()), trunk
    )


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
    """Return (encoders, images, data set) that `params` name: {"target", "reference"} -> file or
    name, see `pictures`.

    The data set is the name of the audited images' manifest (or their folder).
    """
    sets, files = params["sets"], {which: spec for which, spec in params["encoder"].items() if spec}
    for which, spec in files.items():  # before pictures are read, which takes longer
        if _is_file(spec) and not Path(spec).is_file():
            raise FileNotFoundError(
                f"{'ENCODER' if which == 'target' else 'REFERENCE'}: there is no file {spec}; "
                "expected a checkpoint, or the name of a torchvision or timm model."
            )
    wanted = {which: sets[which] for which in SETS if sets[which] or which != "held_out"}
    images = {which: pictures(name, SETS[which]) for which, name in wanted.items()}
    return files, images, sets["images"].partition(":")[0]


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
