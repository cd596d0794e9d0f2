"""Training criteria of the paper, each as its equation: tensors in, a scalar out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def vicreg(z1: Tensor, z2: Tensor, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> Tensor:
    """Return VICReg's loss of two views' projections (n, d): Bardes et al. 2022, eq. 6; the paper's default criterion.

    invariance * s(z, z') + variance * [v(z) + v(z')] / 2 + covariance * [c(z) + c(z')]
    """
    agree = F.mse_loss(z1, z2)
    hinge = sum(F.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean() for z in (z1, z2)) / 2
    decorrelate = sum(_off_diagonal(torch.cov(z.T)).pow(2).sum() / z.shape[1] for z in (z1, z2))
    return invariance * agree + variance * hinge + covariance * decorrelate


def simclr(z1: Tensor, z2: Tensor, temperature: float = 0.15) -> Tensor:
    """Return SimCLR's cross-entropy at a temperature, of two views' projections (n, d): Chen et al. 2020, eq. 1."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    n = len(z1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, partner)


def _off_diagonal(matrix: Tensor) -> Tensor:
    return matrix - torch.diag(torch.diagonal(matrix))


CRITERIA = {"vicreg": vicreg, "simclr": simclr}
