"""The label-inference attack on embeddings: guesses, their confidence, and the table of all.

A *table* is a pandas frame with one row per attacked image and role: id, label, direction ("a" or
"b": the attacked set), role ("target": trained with the image; "reference": without), prediction,
correct, confidence. What is computed from it stands in `scoring` (paper section 4).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from dejavu_utils.attack import knn, scoring

TARGETS = {"a": "A", "b": "B"}  # attacked set -> the model trained with it
CONFIDENCES = ("entropy", "logit")
BLOCK = 8192  # queries that vote at a time


@dataclass(frozen=True)
class Rules:
    """Where the attack may be done in two ways: the defaults are ours, the paper's code has the
    other. Notebooks have them as the parameter `rules`.
    """

    ties: str = "nearest"  # of votes: to the nearer class; the paper's: "lowest class" (knn.vote)
    confidence: str = "entropy"  # in class scores: minus their entropy; the paper's: "logit"
    keep: float = 1.0  # share of the shorter side that is embedded; the paper's: .875 (224 of 256)
    rounding: str = "up"  # of how many images the top p % are; the paper's: "down"

    def __post_init__(self) -> None:
        known = {"ties": knn.TIES, "confidence": CONFIDENCES, "rounding": scoring.ROUNDINGS}
        for name, values in known.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"rules: {name} = {value!r}; expected one of {values}.")

        if not 0 < self.keep <= 1:
            raise ValueError(f"rules: keep = {self.keep}; expected 0 < keep <= 1.")


OURS = Rules()


def infer(
    queries: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: np.ndarray | torch.Tensor,
    k: int,
    classes: int,
    ties: str = "nearest",
) -> dict[str, np.ndarray]:
    """Return prediction (q,), confidence (q,) nats, neighbours (q, k), distances (q, k).

    `queries` (q, d) and `bank` (n, d) are embeddings, `bank_labels` (n,) ints; `neighbours` are
    rows of `bank`. The bank is searched in the order of its labels, so a tie at the k-th neighbour
    goes to the lower class whatever the order of the public set; `ties` of votes: see `knn.vote`.
    Paper section 4: k-NN label inference.
    """
    labels = torch.as_tensor(bank_labels).long().cpu()  # (n,)
    if len(labels) != len(bank):
        raise ValueError(
            f"attack.infer: {len(bank)} public embeddings, {len(labels)} labels; expected one each."
        )

    order = torch.argsort(labels, stable=True)
    by_label = bank
    if not torch.equal(order, torch.arange(len(order))):
        by_label = bank[order.to(bank.device)]  # a copy; the bank may be large

    distances, columns = knn.search(queries, by_label, k)  # (q, k) each
    neighbours = order.to(columns.device)[columns]
    neighbour_labels = labels.to(columns.device)[neighbours]

    prediction, confidence = [], []
    for voters, near in zip(neighbour_labels.split(BLOCK), distances.split(BLOCK), strict=True):
        votes = knn.vote(voters, near, classes, ties)
        prediction.append(votes.prediction)
        confidence.append(votes.confidence)

    return {
        "prediction": torch.cat(prediction).cpu().numpy(),
        "confidence": torch.cat(confidence).cpu().numpy(),
        "neighbours": neighbours.cpu().numpy(),
        "distances": distances.cpu().numpy(),
    }


def infer_scores(scores: torch.Tensor, confidence: str = "entropy") -> dict[str, np.ndarray]:
    """Return prediction (q,) and confidence (q,) nats of class scores (q, classes), without
    neighbours.

    The attack on the supervised baseline's logits (paper §2.3): the largest score is the guess,
    ties go to the lower class. The confidence is minus the entropy of their softmax, comparable
    with that of votes, or the largest score itself ("logit", as in the paper's code).
    """
    scores = torch.as_tensor(scores).double()  # (q, classes)
    logs = scores.log_softmax(1)
    best = logs.argsort(dim=1, descending=True, stable=True)[:, 0]

    certainty = (logs.exp() * logs).nan_to_num().sum(1)  # 0 log 0 = 0
    if confidence == "logit":
        certainty = scores.amax(1)

    return {
        "prediction": best.cpu().numpy(),
        "confidence": certainty.cpu().numpy(),
    }


def label_inference(
    crops: dict[str, dict[str, torch.Tensor]],
    public: dict[str, torch.Tensor] | None,
    public_labels: np.ndarray | None,
    ids: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    k: int,
    classes: int,
    rules: Rules = OURS,
) -> pd.DataFrame:
    """Return the table of all four (model, attacked set) pairs, in the order of direction, role and
    id.

    `crops[set][model]` (n, d): embeddings of the background crops of set "a" or "b" under model "A"
    or "B"; `public[model]` (m, d) embeddings of X, or None where `crops` holds class scores (n,
    classes) that answer directly; `ids[set]`, `labels[set]` (n,). Target of "a" is A, of "b" is B.
    Of `rules`, ties and confidence count here.
    ValueError when lengths differ, an id appears twice, or a label is outside 0 .. classes - 1.
    """
    seen = np.concatenate([np.asarray(ids[direction]) for direction in TARGETS])
    repeats = len(seen) - len(np.unique(seen))
    if repeats:
        raise ValueError(
            f"attack.label_inference: {repeats} ids repeat; expected disjoint a and b. Partition "
            "again."
        )

    parts = []
    for direction, target in TARGETS.items():
        name = np.asarray(ids[direction])
        truth = np.asarray(labels[direction]).astype(np.int64)
        models = {"target": target, "reference": "B" if target == "A" else "A"}

        for role, model in models.items():
            queries = crops[direction][model]
            _check(f"set {direction}, model {model}", queries, name, truth, classes)

            if public:
                found = infer(queries, public[model], public_labels, k, classes, rules.ties)
            else:
                found = infer_scores(queries, rules.confidence)

            rows = {
                "id": name,
                "label": truth,
                "direction": direction,
                "role": role,
                "prediction": found["prediction"],
                "correct": found["prediction"] == truth,
                "confidence": found["confidence"],
            }
            parts.append(pd.DataFrame(rows).sort_values("id", kind="stable"))

    return pd.concat(parts, ignore_index=True)


def _check(
    where: str, queries: torch.Tensor, ids: np.ndarray, labels: np.ndarray, classes: int
) -> None:
    """Raise ValueError unless embeddings, ids and labels of one set fit together."""
    same_length = len(queries) == len(ids) == len(labels) > 0
    if not same_length or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"attack.label_inference: {where}: {len(queries)} embeddings, {len(ids)} ids, "
            f"{len(labels)} labels; expected one each, at least one, and labels from 0 to "
            f"{classes - 1}."
        )
