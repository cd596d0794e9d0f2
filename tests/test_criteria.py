"""Criteria against lightly's implementations: value and gradient, in float64."""

import pytest
import torch

from dejavu_utils import criteria


@pytest.fixture(params=[(16, 32), (64, 8), (2, 5)], ids=str)
def views(request):
    rng = torch.Generator().manual_seed(sum(request.param))
    z1, z2 = torch.randn(2, *request.param, generator=rng, dtype=torch.float64)
    return (3 * z1 + 1).requires_grad_(), (0.2 * z2 - 2).requires_grad_()


def _same(ours, theirs, views):
    own, peer = ours(*views), theirs(*views)
    torch.testing.assert_close(own, peer, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(own, views), torch.autograd.grad(peer, views), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_vicreg_equals_lightly(views):
    from lightly.loss import VICRegLoss

    _same(criteria.vicreg, VICRegLoss(), views)


def test_vicreg_coefficients_equal_lightly(views):
    from lightly.loss import VICRegLoss

    peer = VICRegLoss(lambda_param=100.0, mu_param=10.0, nu_param=3.0)
    _same(lambda a, b: criteria.vicreg(a, b, invariance=100.0, variance=10.0, covariance=3.0), peer, views)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclr_equals_lightly(views, temperature):
    from lightly.loss import NTXentLoss

    _same(lambda a, b: criteria.simclr(a, b, temperature), NTXentLoss(temperature), views)


@pytest.mark.parametrize("loss", criteria.CRITERIA.values(), ids=criteria.CRITERIA.keys())
def test_order_of_images_does_not_matter(loss, views):
    order = torch.randperm(len(views[0]))
    torch.testing.assert_close(loss(*views), loss(views[0][order], views[1][order]))


def test_vicreg_of_a_collapsed_batch_is_the_variance_term():
    z = torch.ones(8, 4, dtype=torch.float64)
    assert criteria.vicreg(z, z).item() == pytest.approx(25 * (1 - 0.01))
