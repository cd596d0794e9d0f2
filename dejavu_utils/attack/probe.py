"""Conventional checks of an embedding, linear probe and k-NN accuracy: what it has learned, not
what it remembers.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dejavu_utils.attack import knn

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

METHODS = ("lbfgs", "sgd")


def _pair(
    x: Tensor | np.ndarray,
    y: Tensor | np.ndarray,
    classes: int,
    name: str,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Return features (n, d) float32 and labels (n,) int64 on one device; ValueError unless they
    fit.
    """
    features = torch.as_tensor(x).detach().float()
    features = features.to(device or features.device)
    labels = torch.as_tensor(y).long().to(features.device)

    fits = features.ndim == 2 and len(features) == len(labels) > 0
    if not fits or not torch.isfinite(features).all():
        raise ValueError(
            f"probe: {name}: features {tuple(features.shape)}, {len(labels)} labels; expected "
            "finite (n, d), one label each, n >= 1. Look for a diverged checkpoint or an empty "
            "part."
        )

    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"probe: {name}: labels {low} to {high}; expected 0 to {classes - 1}. Pass the data "
            "set's number of classes."
        )
    return features, labels


def fit_lbfgs(
    x: Tensor, y: Tensor, penalty: float, steps: int, tolerance: float = 1e-4
) -> Pipeline:
    """Return standardised logistic regression, fitted in float64: mean loss + penalty / 2 * squared
    weights.

    The loss is convex: the answer depends on neither a seed nor the order of the rows, up to the
    `tolerance`, the largest gradient at which it stops (scikit-learn's own).
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    features = x.double().cpu().numpy()
    labels = y.cpu().numpy()
    count = len(np.unique(labels))

    vectors = 2 if count == 2 else 1  # of two classes scikit-learn keeps one weight vector
    strength = vectors / (len(y) * penalty)
    model = DummyClassifier()
    if count > 1:
        model = LogisticRegression(C=strength, tol=tolerance, max_iter=steps)

    # On one thread: such small products are no faster with more, and the bits do not depend on the
    # cores. Where nearly collapsed features need more than `steps` iterations, that limit is the
    # recipe's: no warning for each of them.
    with threadpool_limits(1, "blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return make_pipeline(StandardScaler(), model).fit(features, labels)


def fit_sgd(
    views: Tensor,
    y: Tensor,
    classes: int,
    seed: int,
    epochs: int,
    rates: tuple[float, float],
    batch: int,
) -> tuple[Tensor, Tensor]:
    """Return weight (classes, d) and bias after the paper's recipe: SGD, momentum 0.9, no decay,
    batches of 64.

    `views` (v, n, d): each epoch takes the next view of every image, and after the last the first.
    The rate falls linearly from `rates[0]` to `rates[1]` over all steps, set anew every 50 steps.
    Such rates suit features of length 1 only: each feature is standardised and divided by the
    square root of d (the answer is for the features as they are). Starts from nn.Linear's own
    initialisation and draws the batches from `seed`; the last, smaller batch is used too.
    """
    count, n, width = views.shape
    mean = views.mean((0, 1))
    spread = views.std((0, 1), correction=0)
    scale = torch.where(spread > 0, spread, torch.ones_like(spread)) * width**0.5

    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(classes, width + 1, generator=generator) * 2 - 1  # in [-1, 1)
    start = uniform * width**-0.5
    weight = start[:, :-1].clone().to(views.device).requires_grad_()
    bias = start[:, -1].clone().to(views.device).requires_grad_()
    optimizer = torch.optim.SGD([weight, bias], lr=rates[0], momentum=0.9)

    steps = epochs * math.ceil(n / batch)
    done = 0
    with torch.enable_grad():
        for epoch in range(epochs):
            x = (views[epoch % count] - mean) / scale  # (n, d), rows of length about 1
            for rows in torch.randperm(n, generator=generator).to(views.device).split(batch):
                share = (done - done % 50) / steps
                optimizer.param_groups[0]["lr"] = rates[0] + (rates[1] - rates[0]) * share

                optimizer.zero_grad()
                logits = x[rows] @ weight.T + bias  # (b, classes)
                torch.nn.functional.cross_entropy(logits, y[rows]).backward()
                optimizer.step()
                done += 1

    weight = weight.detach().double() / scale.double()
    bias = bias.detach().double() - weight @ mean.double()
    return weight, bias


def _accuracy(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Return the share of rows whose largest logit is their label's; NaN logits (a diverged probe)
    are wrong.
    """
    logits = x.double() @ weight.T + bias  # (n, classes)
    right = logits.argmax(1) == y
    finite = torch.isfinite(logits).all(1)
    return float((right & finite).double().mean())


def linear_probe(
    train_x: Tensor | np.ndarray,
    train_y: Tensor | np.ndarray,
    test_x: Tensor | np.ndarray,
    test_y: Tensor | np.ndarray,
    classes: int,
    method: str = "lbfgs",
    seed: int = 0,
    *,
    views: Tensor | np.ndarray | None = None,
    extra: tuple[Tensor | np.ndarray, Tensor | np.ndarray] | None = None,
    penalty: float = 1e-3,
    steps: int = 1000,
    tolerance: float = 1e-4,
    epochs: int = 20,
    rates: tuple[float, float] = (10.0, 0.1),
    batch: int = 64,
) -> dict[str, float]:
    """Return accuracies of a linear classifier on frozen features: train, test, gap = train - test.

    Features (n, d), labels (n,) ints below `classes`. `views` (v, n, d), of augmented views of the
    training images, are trained on in place of `train_x`, as the paper's probe is; accuracies are
    of the images themselves. `extra` = (x, y) adds the accuracy "extra" on a third set.

    "lbfgs": standardised logistic regression on all views together, L2 `penalty` on the mean loss,
    at most `steps` iterations, or until no gradient is above `tolerance`; needs no seed. "sgd": the
    paper's recipe, another view in every epoch (see `fit_sgd`). The paper's baseline is the gap
    between training images and held-out ones.
    """
    if method not in METHODS:
        raise ValueError(f"probe.linear_probe: method {method!r}; expected one of {METHODS}.")
    x, y = _pair(train_x, train_y, classes, "train")
    sets = {"train": (x, y), "test": _pair(test_x, test_y, classes, "test", x.device)}
    if extra is not None:
        sets["extra"] = _pair(*extra, classes, "extra", x.device)

    seen = x[None] if views is None else _views(views, x)  # (v, n, d)
    widths = {name: features.shape[1] for name, (features, _) in sets.items()}
    widths["views"] = seen.shape[2]
    if len(set(widths.values())) > 1:
        raise ValueError(
            f"probe.linear_probe: feature widths {widths}; expected the same layer for every set."
        )

    found = {}
    if method == "lbfgs":
        model = fit_lbfgs(seen.flatten(0, 1), y.repeat(len(seen)), penalty, steps, tolerance)
        for name, (z, t) in sets.items():
            found[name] = float(model.score(z.double().cpu().numpy(), t.cpu().numpy()))
    else:
        weight, bias = fit_sgd(seen, y, classes, seed, epochs, rates, batch)
        for name, (z, t) in sets.items():
            found[name] = _accuracy(z, t, weight, bias)
    found["gap"] = found["train"] - found["test"]
    return found


def _views(views: Tensor | np.ndarray, x: Tensor) -> Tensor:
    """Return views as float32 (v, n, d) beside the features (n, d) of the same images; ValueError
    unless they fit.
    """
    found = torch.as_tensor(views).detach().float().to(x.device)
    fits = found.ndim == 3 and len(found) > 0 and found.shape[1] == len(x)
    if not fits or not torch.isfinite(found).all():
        raise ValueError(
            f"probe: views {tuple(found.shape)} of {len(x)} images; expected finite (v, n, d), "
            "v >= 1."
        )
    return found


def knn_accuracy(
    train_x: Tensor | np.ndarray,
    train_y: Tensor | np.ndarray,
    test_x: Tensor | np.ndarray,
    test_y: Tensor | np.ndarray,
    k: int = 20,
    classes: int | None = None,
) -> float:
    """Return the share of test rows whose label their k nearest training rows vote for (exact L2; k
    at most n).
    """
    classes = classes or 1 + max(int(torch.as_tensor(y).max()) for y in (train_y, test_y))
    x, y = _pair(train_x, train_y, classes, "train")
    z, t = _pair(test_x, test_y, classes, "test", x.device)
    distances, columns = knn.search(z, x, min(k, len(x)))
    votes = knn.vote(y.to(columns.device)[columns], distances, classes)
    return float((votes.prediction == t.to(columns.device)).double().mean())
