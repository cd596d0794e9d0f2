"""Where an audit's encoders and pictures come from: names, files, folders, and our own pairs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dejavu_utils import limited, store
from dejavu_utils.data import datasets, manifests
from dejavu_utils.data.images import Images
from dejavu_utils.data.pictures import UNNAMED
from dejavu_utils.limited import LIMIT_GIB
from dejavu_utils.models import external
from dejavu_utils.models.encoders import Encoder
from dejavu_utils.models.pairs import Pair
from dejavu_utils.store import StoreError

# the arguments of `audit.run` that are pictures, and what `make audit` calls them
SETS = {"images": "IMAGES", "public": "PUBLIC", "held_out": "HELD_OUT"}


def data_sets() -> list[str]:
    """Return the names of the data sets with a manifest; none where there is no clone."""
    try:
        return manifests.names()
    except store.StoreError:
        return []


def manifest_of(name: object) -> str:
    """Return the data set that `name` means, such as "pets" of "pets:/my/copy"; "" for none."""
    known = name.partition(":")[0] if isinstance(name, str) else ""
    return known if known in data_sets() else ""


@contextmanager
def _budget(limit_gib: float) -> Iterator[None]:
    """Where that budget of memory was too small, say how an audit is given a larger one."""
    try:
        yield
    except StoreError as error:
        if limited.MORE not in str(error):
            raise
        raise StoreError(_advised(str(error), limit_gib)) from error


def _advised(text: str, limit_gib: float) -> str:
    """Return what was said of a budget of memory, with the setting of an audit that raises it."""
    larger = max(LIMIT_GIB, 2 * limit_gib)
    return text.replace(limited.MORE, f"pass audit.limit_gib={larger:g}")


def pictures(
    name: str | Path | Images,
    what: str = "IMAGES",
    labels: bool = True,
    limit_gib: float = LIMIT_GIB,
) -> Images:
    """Return the pictures of a data set ("pets", or with its place "pets:/my/copy"), or of a folder
    or zip (see `datasets.folder`); `Images` are returned as they are. Without `labels` all are of
    one class. Listing them may take `limit_gib` GiB of memory.

    FileNotFoundError and ValueError begin with `what`, the set that was asked for.
    """
    if isinstance(name, Images):
        return name if labels else _unlabelled(name)
    if manifest_of(name):
        known, _, place = name.partition(":")
        with _budget(limit_gib):
            found = datasets.read(known, place or None, limit_gib)
        found = _with_advice(found, limit_gib)
        return found if labels else _unlabelled(found)

    if not str(name) or not Path(name).exists():
        sets = ""
        if data_sets():
            sets = f", or a data set of {', '.join(data_sets())}, or one and its place: pets:/copy"
        found = str(name) or "nothing was passed"
        raise FileNotFoundError(
            f"{what}: {found}; expected a folder or zip of class folders{sets}."
        )
    with _budget(limit_gib):
        found = datasets.folder(Path(name), what, labels, limit_gib=limit_gib)
    return _with_advice(found, limit_gib)


def _with_advice(images: Images, limit_gib: float) -> Images:
    """Return the pictures; for those that need a larger budget their reason says how to give it."""
    skipped = [(name, _advised(reason, limit_gib)) for name, reason in images.skipped]
    return replace(images, skipped=skipped)


def _unlabelled(images: Images) -> Images:
    """Return the pictures as of one class."""
    return replace(images, labels=0 * images.labels, classes=(UNNAMED,))


def encoder(
    spec: str | Encoder,
    weights: str,
    what: str = "ENCODER",
    prefix: str = "",
    unused: str = "",
    limit_gib: float = LIMIT_GIB,
    size: int = 0,
) -> Encoder:
    """Return the encoder that `spec` names, with its weights: see `external.encoder`; one that is
    there already is returned as it is.
    """
    if isinstance(spec, Encoder):
        return spec
    check_encoder(spec, weights, what, limit_gib)
    with _budget(limit_gib):
        return external.encoder(spec, weights or None, prefix, unused, limit_gib, size)


def check_encoder(
    spec: str | Encoder, weights: str, what: str = "ENCODER", limit_gib: float = LIMIT_GIB
) -> None:
    """Raise FileNotFoundError or ValueError, in a moment, if there can be no such encoder."""
    if isinstance(spec, Encoder):
        return
    try:
        with _budget(limit_gib):
            external.check(spec, weights or None, limit_gib)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


def given(params: dict[str, Any]) -> dict[str, str]:
    """Return the arguments of `audit.run` that the parameters of the notebook name."""
    wanted, sets = params["encoder"], params["sets"]
    return {
        "encoder": wanted["target"],
        "weights": wanted["weights"],
        "reference": wanted["reference"],
        "reference_weights": wanted["reference_weights"],
        **{name: sets[name] for name in SETS},
    }


def demonstration(params: dict[str, Any], pair: Pair) -> dict[str, Any]:
    """Return the arguments of `audit.run` for a trained pair of ours: encoder A is audited on the
    images that it was trained on.

    `sets` may name other parts of the split, such as "b" for `images`: then the audit must say no.
    `encoder.reference` "B" takes encoder B as the second model.
    """
    usual = {"images": "a", "public": "public", "held_out": "control"}
    parts = {name: params["sets"][name] or part for name, part in usual.items()}
    models = {"encoder": "A", "reference": params["encoder"]["reference"]}

    for name in parts.values():
        _known(name, pair.parts, pair)
    for name in models.values():
        _known(name, ["", *pair.jobs], pair)

    epoch = params["epochs"][-1]
    files = {
        role: str(pair.jobs[name].checkpoint(epoch)) if name else ""
        for role, name in models.items()
    }
    return files | {name: pair.parts[part] for name, part in parts.items()}


def _known(name: str, there: Any, pair: Pair) -> None:
    if name not in there:
        raise ValueError(
            f"{name!r} is neither a part of our own pair's images ({', '.join(pair.parts)}) nor "
            "one of its encoders, A and B. To audit another encoder, pass it, too (ENCODER)."
        )
