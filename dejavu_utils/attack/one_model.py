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

# Of the features, whitened: few enough for naive Bayes' independence to be nearly true.
COMPONENTS = 8
EPOCHS = 30  # of the network, in which it reaches the accuracy that it keeps
KINDS = ("resnet", "naive_bayes")
# What the network takes from a pair's recipe.
KEPT = ("encoder", "projector", "size", "batch", "precision", "threads")
GUESS = ["prediction", "correct", "confidence"]
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
    components = PCA(min(COMPONENTS, len(x) - 1, x.shape[1]), whiten=True, svd_solver="full")
    model = make_pipeline(StandardScaler(), components, GaussianNB()).fit(x, labels)

    def predict(other: torch.Tensor | np.ndarray) -> np.ndarray:
        found = np.zeros((len(other), classes))
        found[:, model.classes_] = model.predict_proba(np.asarray(other, np.float64))
        return found

    return predict


def network(recipe: train.Recipe | None = None, epochs: int = EPOCHS, device: str = "cpu") -> Fit:
    """Return a fit for `cross_fit`: a network of `recipe`'s trunk, supervised on crops, uint8
    squares (n, 3, s, s).

    It has its own views (milder than those of SSL, which destroy what tells backgrounds apart) and
    a weight decay of 0.1 as in the paper's configuration; all crops are held in memory.
    """
    views = {"scale_min": 0.25, "strength": 0.4, "grey": 0.0, "blur": 0.0, "solarize": 0.0}

    given = recipe or train.Recipe()
    own = dataclasses.replace(
        given,
        criterion="supervised",
        constants={},
        views=views,
        weight_decay=0.1,
        engine="own",
        processes=1,
        nodes=1,
        projector=given.projector or "64-64",
    )

    def fit(x: torch.Tensor, labels: np.ndarray, classes: int, name: str) -> Predictor:
        how = dataclasses.replace(own, size=x.shape[-1], batch=min(own.batch, len(x)))
        targets = torch.as_tensor(labels)
        before = torch.get_num_threads()
        torch.set_num_threads(how.threads)
        try:
            training = train.Training(x, how, epochs, name, device, targets, classes)
            for _ in range(epochs):
                training.run_epoch()
        finally:
            torch.set_num_threads(before)

        def predict(other: torch.Tensor) -> np.ndarray:
            logits = embed(training.encoder, other, ("logits",), device=device)["logits"]
            return logits.double().softmax(1).numpy()

        return predict

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
        members = np.flatnonzero(np.asarray(groups) == group)
        order = sorted(members.tolist(), key=rank.__getitem__)
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
    labels = np.asarray(labels)
    fold = np.asarray(fold)
    learn = np.ones(len(labels), bool) if learn is None else np.asarray(learn)
    if not len(x) == len(labels) == len(fold) == len(learn) or len(np.unique(labels)) < 2:
        raise ValueError(
            f"one_model.cross_fit: {len(x)} crops, {len(labels)} labels of "
            f"{len(np.unique(labels))} "
            f"classes, {len(fold)} folds; expected one each and 2 classes or more."
        )
    found = np.full((len(labels), classes), np.nan)
    for part in np.unique(fold):
        judged = fold == part
        known = ~judged & learn
        missing = sorted(set(labels[judged].tolist()) - set(labels[known].tolist()))
        if missing:
            raise ValueError(
                f"one_model.cross_fit: class {missing[0]} has no image outside fold {part}; "
                "expected 2 "
                "images a class or more. Leave the class out, or use more images."
            )
        predict = fit(x[known], labels[known], classes, f"{seed}/one model/{part}")
        found[judged] = predict(x[judged])
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
    one scale, but each model is ranked by its own. Columns: those of two_model, and `reference`,
    the kind.
    """
    target = references.at_layer(pair, epoch, k, layer, attacked, device).query("role == 'target'")
    judged = _judged(pair, epoch, kind, folds, device)
    same = target.drop(columns=GUESS)
    rows = same.merge(judged, on="id", validate="one_to_one").assign(role="reference")
    return pd.concat([target, rows[target.columns]], ignore_index=True).assign(reference=kind)


def _judged(pair: Pair, epoch: int, kind: str, folds: int, device: str) -> pd.DataFrame:
    """Return id and GUESS of all attacked and control images; pairs of one data set and trunk share
    the table.
    """
    if kind not in KINDS:
        raise ValueError(f'one_model.table: kind "{kind}"; expected one of {", ".join(KINDS)}.')
    recipe = pair.jobs["A"].recipe
    how = {name: getattr(recipe, name) for name in KEPT}
    seed = pair.setting["seed"]
    fresh = encoders.untrained(pair.encoder("A", epoch), seed)  # nothing is left of its training
    nobody = dataclasses.replace(pair, jobs={}, setting={"seed": seed})
    make = functools.partial(_judge, nobody, fresh, kind, train.Recipe(**how), folds, device)
    told = {"recipe": how, "crop": pair.crop, "folds": folds}
    return references.cached_table(nobody, kind, make, __name__, **told)


def _judge(
    pair: Pair, fresh: External, kind: str, recipe: train.Recipe, folds: int, device: str
) -> pd.DataFrame:
    """Return id and GUESS of all attacked and control images, named by classifiers of others."""
    seed = pair.setting["seed"]
    classes = len(pair.parts["public"].classes)
    fit = naive_bayes if kind == "naive_bayes" else network(recipe, device=device)
    attacked = references.attacked_sets(pair, "attacked")
    control = references.attacked_sets(pair, "control")
    tables = []
    for side in "ab":
        own, own_rects = references.cropped(attacked[side], pair.crop)
        others, other_rects = references.cropped(control[side], pair.crop)
        squares = [own.squares(recipe.size, own_rects), others.squares(recipe.size, other_rects)]
        x = torch.cat(squares)  # (n, 3, size, size)
        if kind == "naive_bayes":
            x = embed(fresh, x, ("backbone",), device=device)["backbone"]  # (n, d)

        ids = np.concatenate([own.ids, others.ids])
        labels = np.concatenate([own.labels, others.labels])
        learn = np.repeat([True, False], [len(own), len(others)])
        fold = assign(ids, 2 * labels + learn, folds, seed)
        chances = cross_fit(fit, x, labels, fold, classes, learn, f"{seed}/{side}")

        guess = inference.infer_scores(torch.from_numpy(chances).log())
        rows = pd.DataFrame({"id": ids, "prediction": guess["prediction"]})
        rows["correct"] = guess["prediction"] == labels
        rows["confidence"] = guess["confidence"]
        tables.append(rows)
    return pd.concat(tables, ignore_index=True)
