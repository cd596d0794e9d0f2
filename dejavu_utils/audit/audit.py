"""`run`: does one encoder remember its training images? Nothing is retrained; a `Report` comes out.

From a terminal: `python -m dejavu_utils.audit --help`.
"""

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from dejavu_utils import store
from dejavu_utils.attack import scoring
from dejavu_utils.audit import (
    checks,
    conclusion,
    estimate,
    evidence,
    membership,
    report,
    sources,
    subject,
)
from dejavu_utils.audit.findings import Findings
from dejavu_utils.audit.settings import Settings
from dejavu_utils.data.images import Images
from dejavu_utils.models.encoders import Encoder, embed

TRIED = 8  # members that an encoder is tried on


class Report(Findings):
    """What an audit found, and its page."""

    @property
    def name(self) -> str:
        """A file name that no other audit has: the encoder's, and a key of all that was looked
        at.
        """
        return file_name(self.case, self.settings)

    def html(self) -> str:
        """Return the report as one HTML page, which needs no network and runs nothing."""
        return report.page(self)

    def write(self, path: str | Path) -> Path:
        """Write the page, and beside it the membership scores as CSV (id, score, member).

        FileExistsError if the file is there and is not the report of this very audit.
        """
        path = Path(path)
        check_free(path, self.name)
        meta = {"stage": "audit", "parameters": asdict(self.settings), "audit": self.name}
        if self.statistics is not None:
            table = membership.as_csv(self.statistics)
            store.write_table(path.with_suffix(".csv"), table, meta)
        report.write(path, self.html(), meta)
        return path

    def summary(self) -> dict[str, Any]:
        """Return the result as plain values, for JSON; what there is none of is None."""
        values = asdict(self.verdict)
        plain = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in values.items()
        }
        sets = self.case.attacked | {"public": self.case.public}
        return {
            "verdict": plain.pop("word"),
            **plain,
            "status": self.status,
            "encoder": self.case.encoder.name,
            "layer": self.case.layers[0],
            "images": {name: len(images) for name, images in sets.items()},
            "scores": _records(self.scores),
            "controls": _records(self.controls),
            "warning": self.warning,
            "membership": _records(self.membership),
            "owners": _records(self.owners),
            "limits": self.case.limits,
        }


def run(
    encoder: str | Encoder,
    images: str | Path | Images,
    public: str | Path | Images = "",
    held_out: str | Path | Images = "",
    reference: str | Encoder = "",
    *,
    weights: str = "",
    reference_weights: str = "",
    device: str = "cpu",
    progress: evidence.Progress | None = None,
    **settings: Any,
) -> Report:
    """Return the audit of `encoder`: does it remember `images`, which it was trained on?

    `encoder`: a network by its name (see `external.encoder`) with the file `weights`, or an
    encoder. `images`, `public`, `held_out`: folders or zips of class folders, data sets by name,
    or `Images`. `reference`: a second model that was trained without `images`, if there is one.
    With `labels=False` folders need no classes and no `public`; then `held_out` is needed.
    `progress` is called with (pictures done, of how many, of what). `settings`: see `Settings`.
    ValueError and FileNotFoundError say what was found, what was expected, and what to pass.
    """
    chosen = Settings(**settings)
    case = load(
        encoder,
        images,
        public,
        held_out,
        reference,
        weights=weights,
        reference_weights=reference_weights,
        settings=chosen,
    )
    asked = {
        "encoder": described(encoder, weights),
        "reference": described(reference, reference_weights),
    }
    return examine(case, chosen, asked, device, progress)


def load(
    encoder: str | Encoder,
    images: str | Path | Images,
    public: str | Path | Images = "",
    held_out: str | Path | Images = "",
    reference: str | Encoder = "",
    *,
    weights: str = "",
    reference_weights: str = "",
    settings: Settings | None = None,
) -> subject.Subject:
    """Return what an audit looks at, read and made comparable; arguments and errors as of `run`."""
    settings = settings or Settings()
    limit = {"limit_gib": settings.limit_gib}
    sources.check_encoder(encoder, weights, **limit)  # pictures take longer
    if reference:
        sources.check_encoder(reference, reference_weights, "REFERENCE", **limit)

    labels = settings.labels
    members = sources.pictures(images, "IMAGES", labels, **limit)
    known = sources.pictures(public, "PUBLIC", **limit) if labels else None
    fresh = None
    if held_out or not labels:
        fresh = sources.pictures(held_out, "HELD_OUT", labels, **limit)

    how = {"prefix": settings.prefix, "unused": settings.unused, "size": settings.size, **limit}
    target = sources.encoder(encoder, weights, "ENCODER", **how)
    second = None
    if reference:
        second = sources.encoder(reference, reference_weights, "REFERENCE", **how)
    if not settings.dataset:
        settings = replace(settings, dataset=sources.manifest_of(images))
    if labels:
        case = subject.prepare(target, members, known, fresh, second, settings)
    else:
        case = subject.prepare_unlabelled(target, members, fresh, second, settings)
    for what, model in (("ENCODER", target), ("REFERENCE", second)):
        if model is not None:
            _check_encoder(case, model, what)
    return case


def _check_encoder(case: subject.Subject, encoder: Encoder, what: str) -> None:
    """Raise ValueError unless the encoder takes pictures of the size that all will have, and gives
    each an answer of its own: finite, and whatever else is in the batch.
    """
    some = case.members.subset(range(TRIED)).squares(case.size)  # (TRIED, 3, s, s)
    try:
        together = embed(encoder, some, case.layers)
        alone = embed(encoder, some[:1], case.layers)
    except Exception as error:  # it may be anybody's code
        raise ValueError(
            f"{what}: it fails on a picture of {case.size} px ({error}). Pass the size that it was "
            "made for, as reading.size."
        ) from error

    for layer in case.layers:
        found = together[layer]
        size = float(found.abs().max())
        differs = float((found[:1] - alone[layer]).abs().max())
        fault = ""
        if not found.isfinite().all():
            fault = "gives NaN or infinity"
        elif differs > 0.02 * size:  # some calculate in half precision
            fault = "gives a picture another answer alone than among others, or is random"
        elif float((found - found[0]).abs().max()) <= 1e-6 * size:
            fault = f"gives {TRIED} pictures one answer: it has collapsed, or lacks its weights"
        if fault:
            raise ValueError(
                f"{what}: it {fault} ({layer}, {case.size} px). Expected features of each picture "
                "by itself, in evaluation mode. Pass an encoder that gives them."
            )


def examine(
    case: subject.Subject,
    settings: Settings,
    asked: dict[str, str] | None = None,
    device: str = "cpu",
    progress: evidence.Progress | None = None,
    kept: Path | None = None,
) -> Report:
    """Return the audit of a subject: the arithmetic of the notebook 05_audit, in its order.

    `kept` is a folder for embeddings, from which a killed audit goes on (see `evidence.infer`).
    """
    layer = case.layers[0]
    inferred = evidence.infer(case, settings.k, device, progress, kept)
    if not case.labelled:
        return _unlabelled(case, settings, asked or {}, inferred)

    classified = None
    if case.reference is None:
        kind, seed = settings.classifier, settings.seed
        classified = evidence.classify(case, inferred, kind, seed=seed, device=device)
    guesses = evidence.table(case, inferred, classified)

    scores = estimate.scores(guesses)
    controls = checks.controls(case, guesses, inferred)
    verdict = conclusion.verdict(case, scores, controls, settings.margin)

    statistics = summary = None
    if case.held_out is not None:
        statistics = membership.statistics(case, inferred, guesses)
        summary = membership.summary(statistics)

    own = evidence.part(guesses, layer)
    return Report(
        case=case,
        settings=settings,
        asked=asked or {},
        inferred=inferred,
        guesses=guesses,
        scores=scores,
        controls=controls,
        warning=checks.boxes(case, inferred),
        classes=estimate.by_class(own, case.public.classes),
        owners=_owners(case, guesses),
        split=scoring.four_way(own),
        verdict=verdict,
        statistics=statistics,
        membership=summary,
    )


def _unlabelled(
    case: subject.Subject, settings: Settings, asked: dict[str, str], inferred: evidence.Found
) -> Report:
    """Return the audit of pictures without labels: by the alignment gap, as AUC - 0.5."""
    statistics = membership.statistics(case, inferred)
    controls = checks.unlabelled(case, statistics, inferred)

    row = estimate.sure(membership.over_chance(statistics, "alignment_gap"))
    about = {"layer": case.layers[0], "reading": estimate.DIFFERENCE, "p": 100}
    scores = pd.DataFrame([about | row])
    return Report(
        case=case,
        settings=settings,
        asked=asked,
        inferred=inferred,
        guesses=None,
        scores=scores,
        controls=controls,
        warning="",
        classes=None,
        owners=None,
        split=None,
        verdict=conclusion.verdict(case, scores, controls, settings.margin),
        statistics=statistics,
        membership=membership.summary(statistics),
    )


def _owners(case: subject.Subject, guesses: pd.DataFrame) -> pd.DataFrame | None:
    """Return the scores of each owner, if boxes.csv names owners and there are held-out images."""
    owners = case.members.attributes.get("owner")
    if owners is None or case.held_out is None:
        return None
    members = evidence.part(guesses, case.layers[0])
    held_out = evidence.part(guesses, case.layers[0], which="held-out")
    return estimate.by_owner(members, held_out, pd.Series(owners, case.members.ids))


def file_name(case: subject.Subject, settings: Settings) -> str:
    """Return the name of an audit's report, such as "torchvision-resnet50-1a2b3c4d"."""
    models = [case.encoder, case.reference]
    sets = case.attacked | {"public": case.public}
    chosen = asdict(settings)
    del chosen["limit_gib"]  # changes nothing that is found
    owners = [case.owners(each) for each in case.attacked.values()]
    key = store.key(
        encoders=[getattr(model, "sha256", "") for model in models],
        images={name: each.digest for name, each in sets.items()},
        owners=[each.tolist() for each in owners if each is not None],
        settings=chosen,
        read=[case.crop, case.size, case.layers],
    )
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", getattr(case.encoder, "name", "encoder"))
    return f"{plain.strip('-.')[-80:]}-{key[:8]}"


def kept(path: Path, name: str) -> Path:
    """Return the hidden folder beside a report for what the audit `name` has embedded so far: it
    is of this very audit, by this very code.
    """
    return path.parent / f".{name}-{store.code_version(evidence.__name__)}.parts"


def check_free(path: Path, name: str) -> None:
    """Raise FileExistsError if a file is there and is not the report of the audit `name`.

    Under that name, which holds the audit's key, it is: also if it or its sidecar is damaged.
    """
    if not path.exists() or path.stem == name:
        return
    try:
        mine = store.verify(path).get("audit") == name
    except (store.StoreError, OSError):
        mine = False
    if not mine:
        raise FileExistsError(
            f"OUT: {path} is there already, and is not the report of this audit; nothing was "
            "written. Pass another OUT, or move it."
        )


def described(encoder: str | Encoder, weights: str) -> str:
    """Return an encoder and its weights in words."""
    if isinstance(encoder, Encoder):
        return getattr(encoder, "name", "") or type(encoder).__name__
    return f"{encoder}, weights {weights}" if weights else encoder


def _records(frame: pd.DataFrame | None) -> list[dict[str, Any]]:
    """Return the rows of a table as plain values; NaN becomes None."""
    return [] if frame is None else json.loads(frame.to_json(orient="records", double_precision=15))
