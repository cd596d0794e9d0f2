"""Training criteria of the paper, each as its equation: tensors in, a scalar out.

All of them are means over the whole batch. Over several processes `methods` gathers the batch
first, so that W processes compute what one would.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def vicreg(
    z1: Tensor,
    z2: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Tensor:
    """Return VICReg's loss of two views' projections (n, d): Bardes et al. 2022, eq. 6; the paper's
    default criterion.

    invariance * s(z, z') + variance * [v(z) + v(z')] / 2 + covariance * [c(z) + c(z')]
    """
    agree = F.mse_loss(z1, z2)
    hinge = sum(F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean() for z in (z1, z2)) / 2
    decorrelate = sum(_covariance_penalty(z) for z in (z1, z2))
    return invariance * agree + variance * hinge + covariance * decorrelate


def barlow_twins(z1: Tensor, z2: Tensor, redundancy: float = 0.0051) -> Tensor:
    """Return Barlow Twins' loss of two views' projections (n, d): Zbontar et al. 2021, eq. 1.

    sum_i (1 - C_ii)^2 + redundancy * sum_{i != j} C_ij^2, where C (d, d) is the views'
    cross-correlation over the batch, each view standardised by its own mean and deviation.
    """
    z1, z2 = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    diagonal = (z1 * z2).mean(0)  # (d,) C_ii
    invariance = (1 - diagonal).pow(2).sum()
    off_diagonal = _sum_of_squares(z1, z2) / len(z1) ** 2 - diagonal.pow(2).sum()
    return invariance + redundancy * off_diagonal


def simclr(z1: Tensor, z2: Tensor, temperature: float = 0.15) -> Tensor:
    """Return SimCLR's cross-entropy at a temperature, of two views' projections (n, d): Chen et al.
    2020, eq. 1.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    n = len(z1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, partner)


def byol(p1: Tensor, p2: Tensor, t1: Tensor, t2: Tensor) -> Tensor:
    """Return BYOL's loss: predictions p (n, d) of each view against the target's projections t of
    the other one.

    |p - t|^2 of unit vectors is 2 - 2 cos(p, t); summed over both directions: Grill et al. 2020,
    eq. 2 and 3.
    """
    return sum(2 - 2 * F.cosine_similarity(p, t).mean() for p, t in ((p1, t2), (p2, t1)))


def dino(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    student_temperature: float = 0.1,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """Return DINO's cross-entropy H(teacher, student), mean over pairs of different views: Caron et
    al. 2021, eq. 3.

    `student` (s, n, c) prototype scores of all views, `teacher` (t, n, c) of the first t of them
    (the global views), `centre` (c,) is subtracted from the teacher's: centring and sharpening keep
    the pair from collapsing.
    """
    wanted = F.softmax((teacher - centre) / teacher_temperature, dim=-1)
    given = F.log_softmax(student / student_temperature, dim=-1)
    entropy = -torch.einsum("tnc,snc->ts", wanted, given) / student.shape[1]
    same = torch.eye(*entropy.shape, dtype=torch.bool, device=entropy.device)
    return entropy.masked_fill(same, 0).sum() / (~same).sum()


def supervised(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of class scores (n, classes) and labels (n,): the paper's supervised
    baseline (§2.2).
    """
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def _covariance_penalty(z: Tensor) -> Tensor:
    """Return c(z) of VICReg: the sum of the squared covariances of different dimensions, over d."""
    n, d = z.shape
    centred = z - z.mean(0)  # (n, d)
    every = _sum_of_squares(centred, centred) / (n - 1) ** 2
    return (every - z.var(0).pow(2).sum()) / d


def _sum_of_squares(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of the squared entries of x.T @ y (d, d), for x and y (n, d).

    It equals the sum of (x @ x.T) * (y @ y.T): where a batch is smaller than the projector is wide,
    those (n, n) products are the cheaper way.
    """
    n, d = x.shape
    if n >= d:
        return (x.T @ y).pow(2).sum()
    return ((x @ x.T) * (y @ y.T)).sum()
