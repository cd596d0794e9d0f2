"""What an encoder, its controls and the reference say of each attacked image: the tidy table.

The encoder names the object of an image from its background crop (`attack.inference`). The
reference says how often that is possible without having seen the image: a second model, or else a
classifier of crops, cross-fitted (the one-model test, Kokhlikyan et al. 2024).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import entr
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dejavu_utils import store
from dejavu_utils.attack import inference, one_model
from dejavu_utils.audit.subject import Subject
from dejavu_utils.data.images import Images
from dejavu_utils.models import encoders
from dejavu_utils.models.encoders import Encoder, embed

CHUNK = 500  # pictures between two steps of the progress line
BATCH_PX = 3_000_000  # of the pictures that are embedded at once: 500 of 77 px, 59 of 224 px
FOLDS = 5

# (set, layer, model) -> arrays of its images
Found = dict[tuple[str, str, str], dict[str, np.ndarray]]
# set -> (prediction (n,), confidence (n,), probability of the true class (n,))
Guesses = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
# (pictures done, of how many, of what)
Progress = Callable[[int, int, str], None]


def infer(
    case: Subject,
    k: int,
    device: str = "cpu",
    progress: Progress | None = None,
    kept: Path | None = None,
) -> Found:
    """Return {(set, layer, model): what `inference.infer` finds} for the attacked sets.

    Without public pictures nothing is inferred, and what does not need them is found alone. Models
    are "target", "untrained" (the same network, its weights drawn anew) and, if there is
    one, "reference". Pictures are decoded once for all of them. The judged layer also has
    `alignment` (n,), the cosine of crop and whole picture, and `norm` (n,), the whole picture's
    length; the untrained backbone has `features` (n, d) and `pixels` (n, 10), simple statistics, of
    the crops. Where boxes are avoided, the target of members also has `in_box` and `in_whole` (b,),
    its predictions for box contents and whole pictures of the first members (see checks.boxes).

    `kept` is a folder for what is embedded, read again by the next run after a kill; whoever passes
    it deletes it, and passes it for this very audit only.
    """
    models = {"target": case.encoder, "untrained": encoders.untrained(case.encoder)}
    if case.reference is not None:
        models["reference"] = case.reference
    embedded = _Embedding(case, models, device, progress, kept)
    classes = len(case.public.classes)
    judged = case.layers[0]

    bank = embedded(case.public, None, "public pictures")[0] if case.labelled else {}
    found: Found = {}
    for name, images in case.attacked.items():
        crops, pixels = embedded(images, case.rects(images), f"crops of {name} pictures")
        wholes, _ = embedded(images, None, f"{name} pictures")
        for layer in case.layers:
            for model in models:
                found[name, layer, model] = {}
                if case.labelled:
                    found[name, layer, model] = inference.infer(
                        crops[layer][model], bank[layer][model], case.public.labels, k, classes
                    )
        for model in models:
            crop, whole = crops[judged][model], wholes[judged][model]
            found[name, judged, model]["alignment"] = cosine_similarity(crop, whole).numpy()
            found[name, judged, model]["norm"] = whole.norm(dim=1).numpy()
        untrained = found[name, "backbone", "untrained"]
        untrained["features"] = crops["backbone"]["untrained"].numpy()
        untrained["pixels"] = pixels.numpy()
        if name == "members" and case.boxed:
            some = images.subset(range(case.boxed))
            contents, _ = embedded(some, largest_boxes(some), "boxes of members")
            seen = {"in_box": contents, "in_whole": wholes}
            for key, those in seen.items():
                queries = those[judged]["target"][: case.boxed]
                guess = inference.infer(
                    queries, bank[judged]["target"], case.public.labels, k, classes
                )
                found[name, judged, "target"][key] = guess["prediction"]
    return found


def largest_boxes(images: Images) -> np.ndarray:
    """Return the largest box of each picture, (n, 4) px."""
    found = []
    for boxes in images.boxes:
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        found.append(boxes[np.argmax(areas)])
    return np.array(found)


class _Embedding:
    """Embeds pictures under all models of an audit, and says how far it is."""

    def __init__(
        self,
        case: Subject,
        models: dict[str, Encoder],
        device: str,
        progress: Progress | None,
        kept: Path | None,
    ) -> None:
        self.models = models
        self.size = case.size
        self.layers = case.layers
        self.device = device
        self.progress = progress
        self.kept = kept
        self.done = 0
        attacked = sum(len(images) for images in case.attacked.values())
        self.total = len(case.public) + 2 * attacked + case.boxed

    def __call__(
        self, images: Images, rects: np.ndarray | None, what: str
    ) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
        """Return {layer: {model: (n, d)}} and the statistics (n, 10) of pictures, or of their
        rectangles; each picture is decoded once.
        """
        parts: dict[str, list[dict[str, Tensor]]] = {model: [] for model in self.models}
        statistics = []
        for start in range(0, len(images), CHUNK):
            rows = np.arange(start, min(start + CHUNK, len(images)))
            cut = None if rects is None else rects[rows]
            found = self._kept_chunk(images.subset(rows), cut, f"{what} {start}")
            statistics.append(found["pixels"])
            for model in self.models:
                parts[model].append({layer: found[f"{model} {layer}"] for layer in self.layers})
            self.done += len(rows)
            if self.progress:
                self.progress(self.done, self.total, what)

        found = {
            layer: {
                model: torch.cat([part[layer] for part in parts[model]]) for model in self.models
            }
            for layer in self.layers
        }
        return found, torch.cat(statistics)

    def _kept_chunk(self, images: Images, rects: np.ndarray | None, name: str) -> dict[str, Tensor]:
        """Return what `_chunk` does, from the folder `kept` if it was there before."""
        if self.kept is None:
            return self._chunk(images, rects)
        path = self.kept / f"{name.replace(' ', '-')}.safetensors"
        try:
            return store.read_tensors(path)[0]
        except (store.StoreError, OSError):  # not there yet, or damaged
            found = self._chunk(images, rects)
            store.write_tensors(path, found)
            return found

    def _chunk(self, images: Images, rects: np.ndarray | None) -> dict[str, Tensor]:
        """Return {"pixels": statistics (c, 10), "<model> <layer>": embeddings (c, d)}."""
        pixels = images.squares(self.size, rects)  # (c, 3, s, s)
        batch = min(CHUNK, max(1, BATCH_PX // self.size**2))
        found = {"pixels": pixel_statistics(pixels)}
        for model, encoder in self.models.items():
            embedded = embed(encoder, pixels, self.layers, batch, self.device)
            _check_finite(embedded, images, model)
            found |= {f"{model} {layer}": embedded[layer] for layer in self.layers}
        return found


def _check_finite(embedded: dict[str, Tensor], images: Images, model: str) -> None:
    """Raise ValueError unless every picture has an embedding of numbers."""
    for layer, features in embedded.items():
        wrong = ~features.isfinite().all(1).numpy()
        if wrong.any():
            raise ValueError(
                f"the {model} encoder gives NaN or infinity for {wrong.sum()} of {len(wrong)} "
                f"pictures, such as {images.ids[wrong][0]} ({layer}). Leave them out, or pass an "
                "encoder that takes them."
            )


def pixel_statistics(pixels: Tensor) -> Tensor:
    """Return what tells how pictures were stored, (n, 10): mean and standard deviation of each
    channel, roughness in x, in y and in both, and the share of pixels that are 0 or 255.
    """
    x = pixels.float()  # (n, 3, s, s)
    across = x.diff(dim=3)
    down = x.diff(dim=2)
    both = across.diff(dim=2)
    clipped = (pixels == 0) | (pixels == 255)
    roughness = [each.abs().mean((1, 2, 3)) for each in (across, down, both)]
    single = torch.stack([*roughness, clipped.float().mean((1, 2, 3))], dim=1)  # (n, 4)
    return torch.cat([x.mean((2, 3)), x.std((2, 3)), single], dim=1)


def classify(
    case: Subject,
    inferred: Found,
    kind: str = "naive_bayes",
    folds: int = FOLDS,
    seed: int = 0,
    device: str = "cpu",
) -> Guesses:
    """Return {set: (prediction, confidence, probability of the true class)} of classifiers of
    crops, none of which saw the image.

    `kind` "naive_bayes" reads the untrained network's backbone, "network" (slower) the crops at 32
    px; neither knows the encoder. Each is fitted on the members of the other folds; held-out images
    are dealt out, too, but never learned from. Kokhlikyan et al. 2024.
    """
    sets = case.attacked
    labels = np.concatenate([images.labels for images in sets.values()])
    lengths = [len(images) for images in sets.values()]
    part = np.repeat(np.arange(len(sets)), lengths)
    owners = [case.owners(images) for images in sets.values()]

    if kind == "network":
        x = torch.cat([case.squares(images, 32) for images in sets.values()])
        fit = one_model.network(device=device)
    else:
        x = np.concatenate([inferred[name, "backbone", "untrained"]["features"] for name in sets])
        fit = one_model.naive_bayes

    # folds depend on names: these were there first, and published folds stay as they are
    prefix = {"members": "audited", "held-out": "unseen"}
    ids = [f"{prefix[name]}/{each}" for name, images in sets.items() for each in images.ids]
    fold = one_model.assign(np.array(ids), 2 * labels + part, folds, seed)
    if owners[0] is not None:
        fold = _of_owners(np.concatenate(owners), labels, part == 0, fold, folds, seed)
    classes = len(case.public.classes)
    chances = one_model.cross_fit(fit, x, labels, fold, classes, part == 0, seed)  # (n, classes)

    prediction = chances.argmax(1)
    confidence = -entr(chances).sum(1)
    probability = chances[np.arange(len(labels)), labels]
    return {
        name: (prediction[part == i], confidence[part == i], probability[part == i])
        for i, name in enumerate(sets)
    }


def _of_owners(
    owners: np.ndarray,
    labels: np.ndarray,
    learn: np.ndarray,
    fold: np.ndarray,
    folds: int,
    seed: int,
) -> np.ndarray:
    """Return folds in which no owner is in two, or `fold` where a class would have nobody to be
    learned from: what a classifier learned of an owner would be knowledge of the others' pictures.
    """
    names, of = np.unique(owners, return_inverse=True)
    dealt = one_model.assign(names, np.zeros(len(names)), folds, seed)[of]
    apart = pd.Series(dealt[learn]).groupby(labels[learn]).nunique()
    return dealt if (apart > 1).all() else fold


def table(case: Subject, inferred: Found, classified: Guesses | None = None) -> pd.DataFrame:
    """Return a tidy table, a row per set, layer, model ("target", "untrained"), role and image.

    The reference is the second model, or `classified`, what the classifiers of crops say; the
    untrained network is compared with the same one. `probability` is the share of votes, or the
    classifier's probability, that a role gives to the truth; `owner` is there where owners are
    known. `scoring` takes the rows of one set, layer and model (see `part`).
    """
    parts = []
    for name, images in case.attacked.items():
        for layer in case.layers:
            second = inferred.get((name, layer, "reference"))
            reference = _votes(case, second, images) if second else classified[name]
            for model in ("target", "untrained"):
                about = {"set": name, "layer": layer, "model": model, "direction": "a"}
                own = _votes(case, inferred[name, layer, model], images)
                owners = case.owners(images)
                if owners is not None:
                    about["owner"] = owners
                parts.append(_rows(images, own).assign(role="target", **about))
                parts.append(_rows(images, reference).assign(role="reference", **about))
    return pd.concat(parts, ignore_index=True)


def _rows(images: Images, guesses: tuple[np.ndarray, np.ndarray, np.ndarray]) -> pd.DataFrame:
    prediction, confidence, probability = guesses
    columns = {
        "id": images.ids,
        "label": images.labels,
        "prediction": prediction,
        "correct": prediction == images.labels,
        "confidence": confidence,
        "probability": probability,
    }
    return pd.DataFrame(columns)


def _votes(
    case: Subject, found: dict[str, np.ndarray], images: Images
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (prediction, confidence, share of votes for the truth) of an encoder's neighbours."""
    voted = case.public.labels[found["neighbours"]]  # (n, k)
    share = (voted == images.labels[:, None]).mean(1)
    return found["prediction"], found["confidence"], share


def part(
    rows: pd.DataFrame, layer: str, model: str = "target", which: str = "members"
) -> pd.DataFrame:
    """Return the rows of one set, layer and model: what scoring.score and scoring.four_way take."""
    wanted = (rows["layer"] == layer) & (rows["model"] == model) & (rows["set"] == which)
    return rows[wanted]
