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
            "membership": _records(self.membership),
            "limits": self.case.limits,
        }


def run(
    encoder: str | Encoder,
    images: str | Path | Images,
    public: str | Path | Images,
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
    public: str | Path | Images,
    held_out: str | Path | Images = "",
    reference: str | Encoder = "",
    *,
    weights: str = "",
    reference_weights: str = "",
    settings: Settings | None = None,
) -> subject.Subject:
    """Return what an audit looks at, read and made comparable; arguments and errors as of `run`."""
    settings = settings or Settings()
    sources.check_encoder(encoder, weights)  # pictures take longer
    if reference:
        sources.check_encoder(reference, reference_weights, "REFERENCE")

    members = sources.pictures(images, "IMAGES")
    known = sources.pictures(public, "PUBLIC")
    fresh = sources.pictures(held_out, "HELD_OUT") if held_out else None

    how = {"prefix": settings.prefix, "unused": settings.unused}
    target = sources.encoder(encoder, weights, "ENCODER", **how)
    second = None
    if reference:
        second = sources.encoder(reference, reference_weights, "REFERENCE", **how)
    if not settings.dataset:
        settings = replace(settings, dataset=sources.manifest_of(images))
    case = subject.prepare(target, members, known, fresh, second, settings)
    for what, model in (("ENCODER", target), ("REFERENCE", second)):
        if model is not None:
            _check_size(case, model, what)
    return case


def _check_size(case: subject.Subject, encoder: Encoder, what: str) -> None:
    """Raise ValueError unless the encoder takes one picture of the size that all will have."""
    one = case.members.subset([0]).squares(case.size)
    try:
        embed(encoder, one, case.layers)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{what}: it fails on a picture of {case.size} px ({error}). Pass the size that it was "
            "made for, as reading.size."
        ) from error


def examine(
    case: subject.Subject,
    settings: Settings,
    asked: dict[str, str] | None = None,
    device: str = "cpu",
    progress: evidence.Progress | None = None,
) -> Report:
    """Return the audit of a subject: the arithmetic of the notebook 05_audit, in its order."""
    layer = case.layers[0]
    inferred = evidence.infer(case, settings.k, device, progress)
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
        statistics = membership.statistics(case, guesses, inferred)
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
        classes=estimate.by_class(own, case.public.classes),
        split=scoring.four_way(own),
        verdict=verdict,
        statistics=statistics,
        membership=summary,
    )


def file_name(case: subject.Subject, settings: Settings) -> str:
    """Return the name of an audit's report, such as "torchvision-resnet50-1a2b3c4d"."""
    models = [case.encoder, case.reference]
    sets = case.attacked | {"public": case.public}
    key = store.key(
        encoders=[getattr(model, "sha256", "") for model in models],
        images={name: each.digest for name, each in sets.items()},
        settings=asdict(settings),
        read=[case.crop, case.size, case.layers],
    )
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", getattr(case.encoder, "name", "encoder"))
    return f"{plain.strip('-.')[-80:]}-{key[:8]}"


def check_free(path: Path, name: str) -> None:
    """Raise FileExistsError if a file is there and is not the report of the audit `name`."""
    if not path.exists():
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
