"""The one-model test (Kokhlikyan et al. 2024): the reference is a classifier of background crops,
not a second encoder.

For encoders that cannot be retrained. Whether a crop's class can be inferred without memory is
asked of a classifier that learned it from other images' crops. It is cross-fitted: no image is
judged by a classifier that saw it.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from dejavu_utils.attack import inference, references
from dejavu_utils.models import encoders, train
from dejavu_utils.models.encoders import embed
from dejavu_utils.models.external import External
from dejavu_utils.models.pairs import Pair

COMPONENTS = (
    8  # of the features, whitened: few enough for naive Bayes' independence to be nearly true
)
EPOCHS = 30  # of the network, in which it reaches the accuracy that it keeps
KINDS = ("resnet", "naive_bayes")
KEPT = (
    "encoder",
    "projector",
    "size",
    "batch",
    "precision",
    "threads",
)  # of a recipe, by the network
SAID = ["prediction", "correct", "correct5", "confidence"]
# features or crops (n, ...) -> class probabilities (n, classes)
Predictor = Callable[[torch.Tensor | np.ndarray], np.ndarray]
# (x, labels, classes, name of its random stream) -> Predictor
Fit = Callable[[torch.Tensor | np.ndarray, np.ndarray, int, str], Predictor]


def naive_bayes(
    x: torch.Tensor | np.ndarray, labels: np.ndarray, classes: int, name: str
) -> Predictor:
    """Return a Gaussian naive Bayes of features (n, d): a function of features to class
    probabilities (n, classes).
    """
    from sklearn.decomposition import PCA
    from sklearn.naive_bayes import GaussianNB
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = np.asarray(x, np.float64)
    spread = PCA(min(COMPONENTS, len(x) - 1, x.shape[1]), whiten=True, svd_solver="full")
    model = make_pipeline(StandardScaler(), spread, GaussianNB()).fit(x, labels)

    def judge(other: torch.Tensor | np.ndarray) -> np.ndarray:
        found = np.zeros((len(other), classes))
        found[:, model.classes_] = model.predict_proba(np.asarray(other, np.float64))
        return found

    return judge


def network(recipe: train.Recipe | None = None, epochs: int = EPOCHS, device: str = "cpu") -> Fit:
    """Return a fit for `cross_fit`: a network of `recipe`'s trunk, supervised on crops, uint8
    squares (n, 3, s, s).

    It has its own views (milder than those of SSL, which destroy what tells backgrounds apart) and
    a weight decay of 0.1 as in the paper's configuration; all crops are held in memory.
    """
    views = {"scale_min": 0.25, "strength": 0.4, "grey": 0.0, "blur": 0.0, "solarize": 0.0}

    def fit(x: torch.Tensor, labels: np.ndarray, classes: int, name: str) -> Predictor:
        how = dataclasses.replace(
            recipe or train.Recipe(),
            criterion="supervised",
            constants={},
            views=views,
            weight_decay=0.1,
            engine="own",
            processes=1,
            nodes=1,
            size=x.shape[-1],
        )
        how = dataclasses.replace(
            how, batch=min(how.batch, len(x)), projector=how.projector or "64-64"
        )
        before = torch.get_num_threads()
        torch.set_num_threads(how.threads)
        try:
            training = train.Training(
                x, how, epochs, name, device, torch.as_tensor(labels), classes
            )
            for _ in range(epochs):
                training.run_epoch()
        finally:
            torch.set_num_threads(before)
        encoder = training.encoder
        return lambda other: (
            embed(encoder, other, ("logits",), device=device)["logits"].double().softmax(1).numpy()
        )

    return fit


def assign(ids: np.ndarray, groups: np.ndarray, folds: int, seed: int | str = 0) -> np.ndarray:
    """Return the fold of each image (n,), 0 to folds - 1: the images of each group (their class)
    are dealt out in turn.

    Depends on ids, groups and seed, not on the order of rows. ValueError unless 2 <= folds.
    """
    if folds < 2:
        raise ValueError(
            f"one_model.assign: folds = {folds}; expected 2 or more: a classifier needs other "
            "images."
        )
    rank = [hashlib.sha256(f"{seed}/fold/{name}".encode()).digest() for name in ids]
    fold = np.zeros(len(rank), np.int64)
    for start, group in enumerate(np.unique(groups)):
        order = sorted(np.flatnonzero(np.asarray(groups) == group).tolist(), key=rank.__getitem__)
        fold[order] = (start + np.arange(len(order))) % folds
    return fold


def cross_fit(
    fit: Fit,
    x: torch.Tensor | np.ndarray,
    labels: np.ndarray,
    fold: np.ndarray,
    classes: int,
    learn: np.ndarray | None = None,
    seed: int | str = 0,
) -> np.ndarray:
    """Return class probabilities (n, classes): row i from a classifier of the rows in other folds
    than its own.

    `x` (n, ...) is what the classifier reads, `fold` (n,). Rows where `learn` (n,) is False are
    judged, never learned from: images that the encoder did not see. ValueError with one class (any
    guess is right), or when a class is judged that its classifier has no image of.
    """
    labels, fold = np.asarray(labels), np.asarray(fold)
    learn = np.ones(len(labels), bool) if learn is None else np.asarray(learn)
    if not len(x) == len(labels) == len(fold) == len(learn) or len(np.unique(labels)) < 2:
        raise ValueError(
            f"one_model.cross_fit: {len(x)} crops, {len(labels)} labels of "
            f"{len(np.unique(labels))} "
            f"classes, {len(fold)} folds; expected one each and 2 classes or more."
        )
    found = np.full((len(labels), classes), np.nan)
    for part in np.unique(fold):
        judged, known = fold == part, (fold != part) & learn
        if missing := sorted(set(labels[judged].tolist()) - set(labels[known].tolist())):
            raise ValueError(
                f"one_model.cross_fit: class {missing[0]} has no image outside fold {part}; "
                "expected 2 "
                "images a class or more. Leave the class out, or use more images."
            )
        found[judged] = fit(x[known], labels[known], classes, f"{seed}/one model/{part}")(x[judged])
    return found


def table(
    pair: Pair,
    epoch: int,
    k: int,
    kind: str = "resnet",
    layer: str = "projector",
    attacked: str = "attacked",
    folds: int = 2,
    device: str = "cpu",
) -> pd.DataFrame:
    """Return `references.two_model`'s table at one layer, with a classifier of crops in the second
    encoder's place.

    `kind` "resnet": `network` of the pair's trunk; "naive_bayes": of that trunk's backbone, its
    weights drawn anew. For an image of set a (b) it has seen crops of other images of that set
    alone, what an auditor of encoder A (B) has. `attacked="control"`: the same classifiers judge
    images of neither set: their score is the offset that is there without memory. A confidence is
    minus an entropy in nats, of k votes for the target, of probabilities for the reference: not on
    one scale, so rank with "own". Columns: those of two_model, and `reference`, the kind.
    """
    target = references.at_layer(pair, epoch, k, layer, attacked, device).query("role == 'target'")
    judged = _judged(pair, epoch, kind, folds, device)
    rows = (
        target.drop(columns=SAID)
        .merge(judged, on="id", validate="one_to_one")
        .assign(role="reference")
    )
    return pd.concat([target, rows[target.columns]], ignore_index=True).assign(reference=kind)


def _judged(pair: Pair, epoch: int, kind: str, folds: int, device: str) -> pd.DataFrame:
    """Return id and SAID of all attacked and control images; pairs of one data set and trunk share
    the table.
    """
    if kind not in KINDS:
        raise ValueError(f'one_model.table: kind "{kind}"; expected one of {", ".join(KINDS)}.')
    recipe = pair.jobs["A"].recipe
    how = {name: getattr(recipe, name) for name in KEPT}
    fresh = encoders.untrained(
        pair.encoder("A", epoch), pair.setting["seed"]
    )  # nothing is left of its training
    nobody = dataclasses.replace(pair, jobs={}, setting={"seed": pair.setting["seed"]})
    make = functools.partial(_judge, nobody, fresh, kind, train.Recipe(**how), folds, device)
    return references.cached_table(
        nobody,
        kind,
        make,
        __name__,
        recipe=how,
        crop=pair.crop,
        folds=folds,
    )


def _judge(
    pair: Pair, fresh: External, kind: str, recipe: train.Recipe, folds: int, device: str
) -> pd.DataFrame:
    rows, seed = [], pair.setting["seed"]
    for side in "ab":
        sets = [
            references.cropped(references.attacked_sets(pair, which)[side], pair.crop)
            for which in ("attacked", "control")
        ]
        learn = np.repeat([True, False], [len(images) for images, _ in sets])
        x = torch.cat([images.squares(recipe.size, rects) for images, rects in sets])
        ids, y = (
            np.concatenate([getattr(images, of) for images, _ in sets]) for of in ("ids", "labels")
        )
        if kind == "naive_bayes":
            x = embed(fresh, x, ("backbone",), device=device)["backbone"]
        fit = naive_bayes if kind == "naive_bayes" else network(recipe, device=device)
        fold = assign(ids, 2 * y + learn, folds, seed)
        chances = cross_fit(
            fit, x, y, fold, len(pair.parts["public"].classes), learn, f"{seed}/{side}"
        )
        said = inference.infer_scores(torch.from_numpy(chances).log())
        right = said["top5"] == y[:, None]
        rows.append(
            pd.DataFrame(
                {
                    "id": ids,
                    "prediction": said["prediction"],
                    "correct": right[:, 0],
                    "correct5": right.any(1),
                    "confidence": said["confidence"],
                }
            )
        )
    return pd.concat(rows, ignore_index=True)
